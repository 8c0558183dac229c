"""The optimizer, its groups of parameters, and the learning rate of each step."""

import math
import re

import torch

from config import Config
from models import SegModel, shapes_device
from utils.errors import BadInput


def build_optimizer(model: SegModel, cfg: Config) -> torch.optim.Optimizer:
    """The optimizer over parameter_groups; each group keeps its own peak rate as `peak_lr`. Raises BadInput
    without apex.
    """
    groups = [{**group, 'peak_lr': group['lr']} for group in parameter_groups(model, cfg)]
    if cfg.optimizer == 'adamw':
        return torch.optim.AdamW(groups, fused=True)
    if cfg.optimizer == 'adam':
        return torch.optim.Adam(groups, fused=True)
    if cfg.optimizer == 'sgd':
        return torch.optim.SGD(groups, momentum=0.9, fused=True)
    try:
        from apex.optimizers import FusedAdam
    except ImportError:
        raise BadInput(
            "config key 'optimizer': apex_fused_adam needs NVIDIA's apex, built from "
            'github.com/NVIDIA/apex with its CUDA extensions '
            "(PyPI's apex is something else); adamw is torch's own fused one"
        ) from None
    return FusedAdam(groups, adam_w_mode=True)


def lr_factor(cfg: Config, step: int, total: int) -> float:
    """The learning rate of an iteration as a share of the way from min_lr to the peak: linear warm-up, then
    the schedule.
    """
    warmup = min(cfg.warmup_iters, total // 10)
    if step < warmup:
        return cfg.warmup_ratio + (1 - cfg.warmup_ratio) * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if cfg.lr_schedule == 'cosine':
        return 0.5 * (1 + math.cos(math.pi * progress))
    return (1 - progress) ** cfg.poly_power if cfg.lr_schedule == 'poly' else 1.0


# position tables, tokens and layer scales
NOT_DECAYED = re.compile(r'pos_embed|position_bias|_token|gamma|\b(query|query_position|level)(\.weight)?$')


def parameter_groups(model: SegModel, cfg: Config) -> list[dict]:
    """Groups for an optimizer, by depth and decay, each with its own lr, `depth` and parameter `names`.

    The rate is lr for neck and head, and lr * encoder_lr_mult * layer_decay^(1 + blocks after it) for the
    encoder, as BEiT does (arXiv:2106.08254, appendix). It is the group's own lr, so that any scheduler of
    torch follows it. Vectors, biases, tokens, position tables and layer scales are not decayed.
    """
    depths = encoder_depths([name for name, _ in model.encoder.named_parameters()])
    deepest = max(depths.values())
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_encoder = name.startswith('encoder.')
        depth = depths[name.removeprefix('encoder.')] if in_encoder else deepest + 1
        rate = (
            cfg.lr * cfg.encoder_lr_mult * cfg.layer_decay ** (deepest + 1 - depth) if in_encoder else cfg.lr
        )
        decayed = parameter.ndim > 1 and not name.endswith('.bias') and not NOT_DECAYED.search(name)
        key = (rate, decayed) if cfg.layer_decay == 1 else (depth, decayed)
        group = groups.setdefault(
            key,
            {
                'params': [],
                'names': [],
                'lr': rate,
                'weight_decay': cfg.weight_decay if decayed else 0.0,
                'depth': depth,
            },
        )
        group['params'].append(parameter)
        group['names'].append(name)
    return list(groups.values())


def encoder_depths(names: list[str]) -> dict[str, int]:
    """Depth of each encoder parameter: 0 for the stem, then one more for each block, in the order of the
    forward pass.

    A block is what timm numbers inside a stage; what stands between two (a downsampling, a norm) goes with
    the next one, and a norm at the very end with the last.
    """
    pattern = re.compile(
        r'(?:(?:stages|layers|layer|blocks|block)[._]?\d+\.(?:blocks\.)?\d+|(?:stages|blocks|layers)[._]\d+)\b'
    )
    blocks: dict[str, int] = {}
    found: list[tuple[str, str | None]] = []
    for name in names:
        match = pattern.search(name)
        block = match.group() if match else None
        if (
            block is not None
            and re.search(r'downsample|patch_embed', name)
            and not re.search(r'\.blocks\.', name)
        ):
            block = None
        found.append((name, block))
        if block is not None:
            blocks.setdefault(block, len(blocks) + 1)
    depths: dict[str, int] = {}
    upcoming = len(blocks)
    for name, block in reversed(found):
        if block is not None:
            upcoming = blocks[block]
        depths[name] = upcoming
    first_block = next((i for i, (_, block) in enumerate(found) if block is not None), 0)
    for name, _ in found[:first_block]:
        depths[name] = 0
    return {name: depths[name] for name in names}


def print_groups(cfg: Config) -> None:
    """A line a group of parameter_groups: depth, peak learning rate, weight decay, parameters."""
    with shapes_device(cfg):
        groups = parameter_groups(SegModel(cfg, load_weights=False), cfg)
    print(f'{"depth":>5}{"lr":>12}{"decay":>9}{"tensors":>9}{"parameters":>13}  first')
    for group in sorted(groups, key=lambda group: (group['depth'], group['weight_decay'])):
        count = sum(p.numel() for p in group['params'])
        print(
            f'{group["depth"]:5}{group["lr"]:12.3e}{group["weight_decay"]:9.3g}{len(group["names"]):9}'
            f'{count:13,}  {group["names"][0]}'
        )
