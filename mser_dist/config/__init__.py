"""Says what can be set in a run and what it means. Nothing heavy is imported: a typo answers at once."""

from mser_dist.config.data_keys import SIX_EMOTIONS, AugmentConfig, DataConfig, TrainingDataConfig
from mser_dist.config.keys import (
    BASELINES,
    Baseline,
    Common,
    Dtype,
    EngineConfig,
    Evaluation,
    Schedule,
    Stage1,
    Stage2,
    TrackingConfig,
    TrainConfig,
    batch_shape,
    is_called,
)
from mser_dist.config.model_keys import (
    CacheConfig,
    ContrastiveConfig,
    EncoderConfig,
    LLMConfig,
    LoraConfig,
    QFormerConfig,
    TextConfig,
)

__all__ = [
    "BASELINES",
    "SIX_EMOTIONS",
    "AugmentConfig",
    "Baseline",
    "CacheConfig",
    "Common",
    "ContrastiveConfig",
    "DataConfig",
    "Dtype",
    "EncoderConfig",
    "EngineConfig",
    "Evaluation",
    "LLMConfig",
    "LoraConfig",
    "QFormerConfig",
    "Schedule",
    "Stage1",
    "Stage2",
    "TextConfig",
    "TrackingConfig",
    "TrainConfig",
    "TrainingDataConfig",
    "batch_shape",
    "is_called",
]
