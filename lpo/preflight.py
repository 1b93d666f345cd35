"""What a command would refuse only after it has loaded its models, told when the button is pressed or the command is
typed: models that are not there, CLIP's text projection missing, an LRM of another latent space. The sentences are the
command's own.

Reads names, JSON files and safetensors headers; imports no torch. What only the hub or the weights can tell (an LRM of
another VAE of the same scale, say) is left to the command. From the same files: which family a base is of.
"""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from lpo.config import LPOConfig, LRMConfig, SampleConfig, TraceConfig
from lpo.options import ConfigError
from lpo.places import (
    IDENTITY,
    PROJECTION,
    adapter_file,
    lrm_folder,
    official_base,
    pairs_file,
    projection_files,
    require_projection,
    require_same_space,
    resolve_base,
    single_file_family,
    tensor_shapes,
    unet_files,
    unet_source,
)
from lpo.prompts import read_prompts
from lpo.run_dir import require_writable

Config = SampleConfig | TraceConfig | LRMConfig | LPOConfig
SPACE = ("channels", "scaling_factor", "shift_factor")  # of latents: what plain files tell
PIPELINES = {
    "StableDiffusion3Pipeline": "sd3", "StableDiffusionXLPipeline": "sdxl", "StableDiffusionPipeline": "sd15",
}  # fmt: skip
WIDTH_SD21 = 1024  # of its text encoder; SD1.x has 768, and the same pipeline
MARKS = (  # in a name; SDXL's before SD2.1's, of which "sdxl-2.1" has one, too
    ("sd3", ("diffusion-3", "sd3")), ("sdxl", ("xl",)), ("sd21", ("2-1", "2.1", "sd21", "diffusion-2")),
)  # fmt: skip


def require_startable(config: Config) -> None:
    """Raises ConfigError with the sentence that the command would end with, as far as that can be told at once."""
    if isinstance(config, LRMConfig):
        if config.init == "base":
            _require_projection(config)
        else:
            _require_lrm(config.init, config.base, config.allow_latent_mismatch)
        return
    policy = config.policy
    require_base(policy.base)
    for adapter in policy.adapters:
        adapter_file(adapter.path)
    if policy.unet:
        unet_source(policy.unet)
    lrms = [policy.search.lrm] if policy.search else []
    if not isinstance(config, SampleConfig):
        lrms += [config.lrm] if isinstance(config, LPOConfig) else config.lrm
    for lrm in lrms:
        _require_lrm(lrm, policy.base, config.allow_latent_mismatch)


def require_inputs(config: Config) -> None:
    """Raises ConfigError or DataError unless the files that the command reads are there, and those that it keeps
    outside its run folder can be written. For the command line: a job's are written when it starts."""
    match config:
        case SampleConfig():
            config.texts()
        case TraceConfig():
            config.text()
        case LPOConfig():
            for prompts in (config.prompts, *filter(None, [config.eval_prompts])):
                read_prompts(prompts)
        case LRMConfig():
            pairs_file(config.pairs)
            if config.latent_cache:
                require_writable(config.latent_cache, folder=True)


def require_scorable(
    lrm: str, base: str | None, latents: str, prompts: str, out: str, allow_mismatch: bool
) -> list[str]:
    """The N prompts of `score`, one for each of the latents (N, C, H, W). Raises ConfigError with the sentence that it
    would end with, as far as that can be told at once."""
    require_writable(out)
    shapes = tensor_shapes(Path(latents))
    if not {"latents", "timesteps"} <= set(shapes):
        raise ConfigError(f"{latents} must hold the tensors `latents` and `timesteps`; it has {sorted(shapes)}.")
    x, t, texts = shapes["latents"], shapes["timesteps"], read_prompts(prompts, keep_empty=True)
    if len(x) != 4 or t != x[:1] or len(texts) != x[0]:
        told = f"latents {x}, timesteps {t}, {len(texts)} prompts"
        raise ConfigError(f"The inputs do not match ({told}): N latents (N, C, H, W) need N timesteps and N prompts.")
    folder, own_base = lrm_folder(lrm)
    if not (folder / "lrm.json").exists():
        official_base(folder, own_base or base)
    if base:
        _require_lrm(lrm, base, allow_mismatch)
    return texts


def require_checkable(adapter: str | None, lrm: str | None, unet: str | None, base: str) -> None:
    """Of the three that `check` takes one is given. Raises ConfigError with the sentence that it would end with, as far
    as that can be told at once."""
    require_base(base)
    if adapter is not None:
        tensor_shapes(adapter_file(adapter))
    elif unet is not None:
        unet_files(unet)
    else:
        _require_lrm(lrm, base, False)


def family(base: str) -> str:
    """'scenes', 'sd15', 'sd21', 'sdxl' or 'sd3': whose settings fit a base. It is read from the model's own files; only
    where those are not on this machine, or say nothing known, is it guessed from the name. Raises nothing."""
    if base == "scenes":
        return base
    try:
        source = resolve_base(base)
        found = single_file_family(source).name if Path(source).is_file() else _folder_family(source)
    except ConfigError:  # not there any more, or damaged: a training says so
        found = None
    return found or next((name for name, marks in MARKS if any(mark in base.lower() for mark in marks)), "sd15")


def _folder_family(source: str) -> str | None:
    """Of a folder or of a hub's model, as far as that was fetched."""
    found = PIPELINES.get((_json(_file(source, "model_index.json")) or {}).get("_class_name"))
    width = (_json(_file(source, "text_encoder/config.json")) or {}).get("hidden_size")
    return "sd21" if found == "sd15" and width == WIDTH_SD21 else found


def require_base(base: str) -> str:
    """The folder, file or hub id of a base. Raises ConfigError if it is not there, or a file that is no whole model."""
    source = resolve_base(base)
    if Path(source).is_file():
        single_file_family(source)
    return source


def fits(lrm: str, base: str) -> bool:
    """Whether an LRM may judge or be trained on a base's latents, as far as their files tell at once. One that is gone
    passes: whoever chooses it is told so."""
    try:
        return _space_difference(lrm, base) is None
    except ConfigError:
        return True


def _require_lrm(name: str, base: str, allow_mismatch: bool) -> None:
    require_same_space(_space_difference(name, base), name, base, allow_mismatch)


def _space_difference(name: str, base: str) -> str | None:
    """What an LRM's latent space and a base's differ in, in words; None if nothing, or if nobody can tell yet."""
    folder, own_base = lrm_folder(name)
    ours, theirs = _space(base), _stored_space(folder) or _space(own_base or base)
    if not (ours and theirs):
        return None
    words = (f"{theirs['channels']} against {ours['channels']} latent channels", "another scale", "another shift")
    return next((told for key, told in zip(SPACE, words, strict=True) if abs(theirs[key] - ours[key]) > 1e-3), None)


def _stored_space(folder: Path) -> dict | None:
    """The fingerprint in an LRM's folder; None for an official one, or one that the training will call damaged."""
    found = (_json(folder / "lrm.json") or {}).get("fingerprint")
    whole = isinstance(found, dict) and all(isinstance(found.get(name), int | float) for name in SPACE)
    return found if whole else None


def _space(base: str) -> dict | None:
    """Channels, scale and shift of a base's latents; None if only its weights or the hub know."""
    vae = _json(_file(require_base(base), "vae/config.json"))
    if vae is None:
        return None
    numbers = (vae.get("latent_channels"), vae.get("scaling_factor"), vae.get("shift_factor") or 0.0)
    return dict(zip(SPACE, numbers, strict=True)) if all(isinstance(one, int | float) for one in numbers) else None


def _require_projection(config: LRMConfig) -> None:
    """Where the base's kind and text encoder can be read: it needs CLIP's text projection of the right shape."""
    source, place = require_base(config.base), config.text_projection
    if Path(source).is_file():
        if single_file_family(source).name in ("sd15", "sd21") and not place:
            require_projection(config.base, place, (), None)  # their original layout has none
        return
    kind = (_json(_file(source, "model_index.json")) or {}).get("_class_name")
    width = (_json(_file(source, "text_encoder/config.json")) or {}).get("hidden_size")
    if kind is None or width is None or place == IDENTITY:
        return
    needed = (config.projection_dim or width, width) if kind == "StableDiffusionPipeline" else None
    if needed and place:
        files = projection_files(place)
        files = [_file(place, "model.safetensors")] if files is None else files
    elif Path(source).is_dir():
        files = sorted(Path(source, "text_encoder").glob("*.safetensors"))
    else:
        files = [_file(source, "text_encoder/model.safetensors")]
    if None not in files:  # None: not fetched yet, so nobody knows
        shapes = (tensor_shapes(file).get(PROJECTION) for file in files)
        require_projection(config.base, place, needed, next(filter(None, shapes), None))


def _file(source: str, name: str) -> Path | None:
    """A file of a resolved base or CLIP: in its folder, or in the hub's cache; None if it is not on this machine."""
    if Path(source).exists():
        return Path(source, name)
    try:
        found = try_to_load_from_cache(source, name)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _json(file: Path | None) -> dict | None:
    """None if there is no such file or it is damaged: the training says so."""
    try:
        found = json.loads(file.read_text()) if file is not None else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
