"""Register narrow members of timm's families, for tests: the blocks and the names of tensors of a published
network, but few channels and no more than two blocks a stage, so that one is built, saved and run in no time.
"""

import timm
from timm.models import generate_default_cfgs, register_model

VIT = {'embed_dim': 48, 'num_heads': 3}
STAGES = {'depths': (2, 2, 2, 2), 'num_heads': (1, 2, 4, 8)}
NARROW = {
    'resnet18': {'channels': (64, 24, 32, 48)},
    'vit_tiny_patch16_224': VIT,
    'vit_small_patch16_dinov3': VIT,
    'beit_base_patch16_224': VIT,
    'swin_tiny_patch4_window7_224': {'embed_dim': 24, **STAGES},
    'twins_svt_small': {'embed_dims': (16, 32, 64, 128), **STAGES},
}


def narrow(name: str) -> str:
    """Return the name of the narrow member: it begins with that of the network."""
    return f'{name}_narrow'


default_cfgs = generate_default_cfgs(
    {narrow(name): timm.get_pretrained_cfg(name).to_dict() for name in NARROW}
)


def register(name: str, sizes: dict) -> None:
    def build(pretrained: bool = False, **options):
        return timm.model_entrypoint(name)(pretrained=pretrained, **sizes | options)

    build.__name__ = narrow(name)
    register_model(build)


for name, sizes in NARROW.items():
    register(name, sizes)
