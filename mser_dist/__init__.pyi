from mser_dist.api import evaluate as evaluate
from mser_dist.api import load_config as load_config
from mser_dist.api import train as train
from mser_dist.contrastive import contrastive_loss as contrastive_loss
from mser_dist.prediction.model import load_model as load_model
from mser_dist.stream.dataset import open_set as open_set

__version__: str
__all__ = ["__version__", "contrastive_loss", "evaluate", "load_config", "load_model", "open_set", "train"]
