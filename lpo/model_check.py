"""`python -m lpo check`: does a model file from elsewhere fit a base? Says what it is, or in one sentence why not.

Adapters and UNets are fitted to a base without weights, which takes seconds at any size; an LRM is loaded.
"""

from __future__ import annotations

from lpo.backbones import load_policy
from lpo.backbones.latent_space import require_same
from lpo.config import Adapter, ConfigError, Policy
from lpo.export_base import describe_base
from lpo.export_layers import merge
from lpo.lrm_files import latent_space
from lpo.places import tensor_shapes, unet_files
from lpo.reward_model import LatentRewardModel


def check_adapter(path: str, base: str) -> str:
    """Raises ConfigError unless every layer of the LoRA finds its place in `base`."""
    described = describe_base(base)
    layers = merge(described, [Adapter(path)])
    ranks = sorted({len(layer.down) for layer in layers.values()})
    text = sum(name.startswith("text_encoder") for name in layers)
    told = f"a LoRA of {len(layers)} layers, rank {'-'.join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))}"
    return told + (f", {text} of them in the text encoders" if text else "")


def check_unet(unet: str, base: str) -> str:
    """Raises ConfigError unless the UNet's weights have the names and shapes of the base's."""
    described = describe_base(base)
    if described.prefix != "unet":
        raise ConfigError(f"{base} has no UNet that {unet} could replace.")
    shapes = {name: shape for file in unet_files(unet) for name, shape in tensor_shapes(file).items()}
    if shapes != {name: tuple(value.shape) for name, value in described.net.state_dict().items()}:
        raise ConfigError(f"The UNet {unet} has another architecture than {base}: name the base it was made from.")
    return f"a UNet of {sum(value.numel() for value in described.net.parameters()) / 1e6:.1f} M weights"


def check_lrm(path: str, base: str) -> str:
    """Raises ConfigError unless the LRM loads and shares the latent space of `base`."""
    lrm = LatentRewardModel.from_pretrained(path, base, "cpu", "float32")
    space = load_policy(Policy(base), "cpu", "float32").fingerprint()
    require_same(latent_space(lrm, base), space, path, base, False)
    official = lrm.meta.get("format") == "official"
    pairs = lrm.meta.get("pairs")
    return f"an LRM{' of the official code' if official else ''}" + (f", trained on {pairs} pairs" if pairs else "")
