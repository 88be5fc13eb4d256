"""The training state on disk: sharded, sealed, published at once."""
