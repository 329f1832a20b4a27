"""Several tokens per step: drafts from what stands somewhere already, verified exactly."""
