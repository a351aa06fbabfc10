// Threads that share out the pieces of one job at a time; the caller is one of them.
//
// Pieces are taken one by one, so a thread that the system has stopped delays no more than the piece
// it holds, and one that has not woken yet is not waited for. Whoever waits spins briefly, then
// sleeps: on a machine that does something else, a spinning thread takes a processor away from the
// one that it waits for.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
  public:
    // piece: 0 ... num_pieces - 1; thread: 0 ... num_threads - 1, 0 being the caller.
    using Job = void (*)(const void* context, int piece, int thread);

    explicit Pool(int num_threads) : num_active_(num_threads) {
        for (int i = 1; i < num_threads; i++) threads_.emplace_back([this, i] { work(i); });
    }
    ~Pool() {
        {
            std::lock_guard<std::mutex> hold(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        resting_.notify_all();
        for (auto& thread : threads_) thread.join();
    }
    int num_threads() const { return (int)threads_.size() + 1; }
    int num_active() const { return num_active_; }

    // Have only so many threads take part from now on, 1 ... num_threads.
    void use(int num_active) {
        if (num_active == num_active_) return;
        {
            std::lock_guard<std::mutex> hold(mutex_);
            num_active_ = num_active;
        }
        wake_.notify_all();
        resting_.notify_all();
    }

    template <typename Function> void run(int num_pieces, const Function& function) {
        run(num_pieces,
            [](const void* f, int piece, int thread) { (*(const Function*)f)(piece, thread); },
            &function);
    }

  private:
    // A ticket says which job it is of, how many pieces that has, and which is the next to be taken:
    // whoever advances it has read the job it belongs to.
    using Clock = std::chrono::steady_clock;
    static constexpr auto SPIN = std::chrono::microseconds(50);  // longer than a piece usually lasts
    static constexpr int MOST = 0xffff;
    static int next_of(uint64_t ticket) { return (int)(ticket & MOST); }
    static int pieces_of(uint64_t ticket) { return (int)(ticket >> 16 & MOST); }

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    // Whether it is true before the time to spin is over.
    template <typename Condition> static bool spin(const Condition& condition) {
        for (auto end = Clock::now() + SPIN; !condition();) {
            if (Clock::now() > end) return false;
            for (int i = 0; i < 8; i++) pause();
        }
        return true;
    }

    void run(int num_pieces, Job job, const void* context) {
        if (num_pieces <= 1 || num_active_ == 1) {
            for (int piece = 0; piece < num_pieces; piece++) job(context, piece, 0);
            return;
        }
        job_.store(job, std::memory_order_relaxed);
        context_.store(context, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
        uint64_t number = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
        ticket_.store(number << 32 | (uint64_t)num_pieces << 16);  // seq_cst: before the next line
        if (num_sleeping_.load() > 0) {
            { std::lock_guard<std::mutex> hold(mutex_); }
            wake_.notify_all();
        }
        take(0);
        auto is_over = [&] { return done_.load() == num_pieces; };
        if (spin(is_over)) return;
        std::unique_lock<std::mutex> hold(mutex_);
        awaited_.store(true);  // seq_cst: before is_over looks
        over_.wait(hold, is_over);
        awaited_.store(false);
    }

    // Runs pieces while there are any.
    void take(int thread) {
        uint64_t ticket = ticket_.load();
        while (next_of(ticket) < pieces_of(ticket)) {
            Job job = job_.load(std::memory_order_relaxed);
            const void* context = context_.load(std::memory_order_relaxed);
            if (!ticket_.compare_exchange_weak(ticket, ticket + 1)) continue;
            job(context, next_of(ticket), thread);
            bool is_last = done_.fetch_add(1) + 1 == pieces_of(ticket);
            if (is_last && awaited_.load()) {
                { std::lock_guard<std::mutex> hold(mutex_); }
                over_.notify_one();
            }
            ticket = ticket_.load();
        }
    }

    bool has_work() const {
        uint64_t ticket = ticket_.load();
        return next_of(ticket) < pieces_of(ticket);
    }

    void work(int thread) {
        while (true) {
            if (thread >= num_active_) {
                std::unique_lock<std::mutex> hold(mutex_);
                resting_.wait(hold, [&] { return stop_ || thread < num_active_; });
                if (stop_) return;
            }
            if (!spin([this] { return has_work(); })) {
                std::unique_lock<std::mutex> hold(mutex_);
                num_sleeping_++;
                wake_.wait(hold, [&] { return stop_ || has_work() || thread >= num_active_; });
                num_sleeping_--;
                if (stop_) return;
            }
            take(thread);
        }
    }

    std::atomic<int> num_active_;
    std::vector<std::thread> threads_;
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int> done_{0};
    alignas(64) std::atomic<Job> job_{nullptr};
    std::atomic<const void*> context_{nullptr};
    std::atomic<int> num_sleeping_{0};
    std::atomic<bool> awaited_{false};  // the caller sleeps until the last piece is done
    std::mutex mutex_;
    std::condition_variable wake_, resting_, over_;
    bool stop_ = false;
};
