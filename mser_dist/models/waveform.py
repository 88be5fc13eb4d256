"""Encoders of the raw waveform: wav2vec 2.0 (arXiv 2006.11477), HuBERT (2106.07447) and WavLM (2110.13900)."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import HubertModel, PreTrainedConfig, PreTrainedModel, Wav2Vec2Model, WavLMModel

from mser_dist.errors import UserError
from mser_dist.models.encoder import Encoder
from mser_dist.stream.features import Features

MODELS: dict[str, type[PreTrainedModel]] = {"wav2vec2": Wav2Vec2Model, "hubert": HubertModel, "wavlm": WavLMModel}

# Masking is the stream's task (data.augment); LayerDrop would leave ZeRO-3's ranks in different layers; the adapter's
# convolutions run over the padding, so that a clip would depend on its batch.
SWITCHED_OFF = {
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "layerdrop": 0.0,
    "add_adapter": False,
}


def switch_off(config: PreTrainedConfig) -> None:
    """Set the fields of `SWITCHED_OFF`. Raises `UserError` for a model whose features depend on the batch."""
    if getattr(config, "conv_pos_batch_norm", False):
        raise UserError("the encoder has conv_pos_batch_norm, which mixes the clips of a batch: choose one without it")
    for name, value in SWITCHED_OFF.items():
        if hasattr(config, name):
            setattr(config, name, value)


class WaveformEncoder(Encoder):
    """A wav2vec-style encoder of padded clips, whose features are those of each clip alone.

    There is no longest clip: positions are relative. A clip shorter than one frame (`min_samples`, 400 samples or 25 ms
    for the published models) counts as one that ends in zeros up to that length.

    normalize: the waveform comes with zero mean and unit variance, as the checkpoint was trained.
    """

    def __init__(self, model: PreTrainedModel, normalize: bool) -> None:
        super().__init__(len(model.encoder.layers))
        self.model: Any = model
        self.normalize = normalize
        if model.config.feat_extract_norm == "group":
            first = model.feature_extractor.conv_layers[0]
            first.layer_norm = _ClipNorm(first.layer_norm)

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def features(self) -> Features:
        return Features(n_mels=None, normalize=self.normalize, pad_seconds=self.pad_seconds)

    @property
    def min_samples(self) -> int:
        """Samples that one frame of the convolutions sees."""
        samples, config = 1, self.model.config
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples

    def cut(self, highest: int) -> None:
        del self.model.encoder.layers[highest:]
        self.model.config.num_hidden_layers = highest
        if highest < self.depth and self.model.config.do_stable_layer_norm:  # its norm comes behind the last layer
            self.model.encoder.layer_norm = nn.Identity()

    def frames(self, lengths: Tensor) -> Tensor:
        return self._frames(lengths.clamp(min=self.min_samples))

    def hidden(self, speech: Tensor, lengths: Tensor) -> tuple[list[Tensor], Tensor]:
        """(B, S) waveform and (B,) own samples → (B, T, width) of each used layer, 50 frames a second; own frames."""
        lengths = lengths.clamp(min=self.min_samples)
        fed = self.fed(lengths)
        speech = nn.functional.pad(speech, (0, max(0, self.min_samples - speech.shape[-1]))).to(self.model.dtype)
        real = torch.arange(speech.shape[-1], device=speech.device) < fed[:, None]  # (B, S)
        norm = self.model.feature_extractor.conv_layers[0].layer_norm
        if isinstance(norm, _ClipNorm):
            norm.lengths = self._frames(fed, convolutions=1).tolist()
        states: dict[int, Tensor] = {}
        layers = self.model.encoder.layers
        hooks = [
            layer.register_forward_hook(lambda _, __, out, n=n: states.update({n: _first(out)}))
            for n, layer in enumerate(layers, 1)
        ]
        if len(layers):
            hooks.append(layers[0].register_forward_pre_hook(lambda _, given: states.update({0: given[0]})))
        try:
            states[len(layers)] = self.model(speech, attention_mask=real.long()).last_hidden_state  # its norm included
        finally:
            for hook in hooks:
                hook.remove()
        return [states[number] for number in self.layers], self._frames(lengths)

    def _frames(self, samples: Tensor, convolutions: int | None = None) -> Tensor:
        """(B,) frames that the convolutions, or the first few of them, make of so many samples."""
        config = self.model.config
        for kernel, stride in list(zip(config.conv_kernel, config.conv_stride, strict=True))[:convolutions]:
            samples = (samples - kernel) // stride + 1
        return samples


def _first(out: Any) -> Tensor:
    """The hidden states among what a layer returns."""
    return out[0] if isinstance(out, tuple) else out


class _ClipNorm(nn.GroupNorm):
    """The first convolution's GroupNorm, which takes mean and variance over time, over each clip's own frames.

    transformers' own takes them over the padding too. One call for the batch, not one a clip: ZeRO-3 gathers weights
    at every call of a module, so all ranks must make equally many.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps)
        self.load_state_dict(norm.state_dict())
        self.lengths: list[int] = []  # frames of each clip of the batch, set before each forward

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) → the same shape, zeros in the padding."""
        clips = [super(_ClipNorm, self).forward(clip[None, :, :n]) for clip, n in zip(x, self.lengths, strict=True)]
        return torch.cat([nn.functional.pad(clip, (0, x.shape[-1] - clip.shape[-1])) for clip in clips])
