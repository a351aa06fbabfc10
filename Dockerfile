# The server, for NVIDIA GPUs and for CPUs:
#   docker build -t nanovllm .                                 (PyTorch with CUDA)
#   docker build -t nanovllm --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
#   docker run --gpus all -p 8000:8000 -v ~/.cache:/root/.cache nanovllm Qwen/Qwen3-0.6B
FROM python:3.12-slim AS build
ARG TORCH_INDEX=https://pypi.org/simple
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/nanovllm
ENV PATH=/opt/nanovllm/bin:$PATH
RUN pip install --no-cache-dir --index-url $TORCH_INDEX --extra-index-url https://pypi.org/simple torch
COPY . /source
RUN pip install --no-cache-dir /source

FROM python:3.12-slim
# Triton compiles its launchers with the C compiler of the machine that it runs on.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/nanovllm /opt/nanovllm
ENV PATH=/opt/nanovllm/bin:$PATH
EXPOSE 8000
# Names of the machine are its own here, so that the server may be asked from outside the container;
# who may ask is up to `--api-key` and to the ports that are published.
ENTRYPOINT ["nanovllm", "serve", "--host", "0.0.0.0"]
