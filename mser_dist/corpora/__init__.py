"""Turns the recordings of a corpus into shards: one parser a corpus, manifests, splits by speaker, `mser pack`."""
