"""Text to batches: records, prompts, token ids, packed rows."""
