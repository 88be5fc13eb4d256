"""The splits of a set, in their order. Light, so that the command line may name them."""

SPLITS = ("train", "val", "test")
