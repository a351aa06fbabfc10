"""How long a test waits for what must happen: only a fault takes that long, on any machine."""

WAIT_S = 60.0
