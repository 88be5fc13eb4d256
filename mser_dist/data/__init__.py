"""From corpora or synthesis to shards, and from shards to batches."""
