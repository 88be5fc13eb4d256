"""Zero-shot multilingual speech emotion recognition: contrastive alignment, then a whole LLM, on clusters.

From Python, each name below is loaded where it is first used, so that `import mser_dist` takes no time:

    import mser_dist

    config = mser_dist.load_config("demo_stage1", {"data.sets": ["shards/mine"], "out": "runs/mine"})
    summary = mser_dist.train(config)
    report = mser_dist.evaluate(mser_dist.load_config("demo_eval", {"stage1": "runs/mine", "out": "runs/mine-eval"}))
    print(mser_dist.load_model("runs/mine").predict("x.wav", labels=["calm", "furious"]).label)
    clips = mser_dist.open_set("shards/mine", split="test")  # a torch dataset: clips[0]["audio"], clips[0]["label"], …
    loss = mser_dist.contrastive_loss(x, y, torch.tensor(14.0), loss="supcon", labels=labels).loss
"""

import importlib

__version__ = "0.2.0"

# As text, and so no import that the layers contract of pyproject.toml could see: the root lies below every room.
_OFFERED = {
    "contrastive_loss": "mser_dist.contrastive",
    "evaluate": "mser_dist.api",
    "load_config": "mser_dist.api",
    "load_model": "mser_dist.prediction.model",
    "open_set": "mser_dist.stream.dataset",
    "train": "mser_dist.api",
}

__all__ = ["__version__", "contrastive_loss", "evaluate", "load_config", "load_model", "open_set", "train"]


def __getattr__(name: str) -> object:
    if name not in _OFFERED:
        raise AttributeError(f"module 'mser_dist' has no attribute {name!r}: it offers {', '.join(_OFFERED)}")
    found = getattr(importlib.import_module(_OFFERED[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_OFFERED})
