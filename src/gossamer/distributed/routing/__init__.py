"""Which replica a request goes to: pure Python, without Ray, so that servers and the simulator run the same code."""
