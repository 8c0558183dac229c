# The code and its packages in an image. Data and runs stay outside: they are mounted.
#     docker build -t trash-segmentation .                      # torch with CUDA, from requirements.lock
#     docker build -t trash-segmentation --build-arg DEVICE=cpu .
#     docker run --rm -it --gpus all --shm-size=8g -v "$PWD/input:/app/input" -v "$PWD/output:/app/output" trash-segmentation \
#         python train.py --cfg configs/convnext.yaml --fold 0
FROM debian:trixie-slim

RUN apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates git python3-venv && \
    rm -rf /var/lib/apt/lists/* && \
    git config --system safe.directory /app  # provenance.yaml has the commit, whoever runs this

WORKDIR /app
ENV PATH=/app/.venv/bin:$PATH PIP_NO_CACHE_DIR=1 MPLCONFIGDIR=/tmp/matplotlib

ARG DEVICE=cuda
COPY requirements.txt requirements.lock ./
# pip prefers 2.14.1+cpu of PyTorch's own index to PyPI's 2.14.1, which has CUDA
RUN python3 -m venv .venv && \
    case $DEVICE in \
        cuda) pip install --require-hashes -r requirements.lock ;; \
        cpu) PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu pip install -r requirements.txt ;; \
        *) echo "DEVICE=$DEVICE: expected cuda or cpu" >&2; exit 2 ;; \
    esac

COPY . .
CMD ["bash"]
