# Image for GPU nodes, with Transformer Engine compiled. It has not been built by us yet: we had no Docker and no GPU.
#
#   docker build -t meds .
#   docker run --gpus all --ipc=host -v $PWD/runs:/meds/runs -v /models:/models meds \
#       meds train configs/meds_qwen2.5_math_7b.yaml model.path=/models/Qwen2.5-Math-7B
#
# For Slurm with enroot and pyxis: enroot import -o meds.sqsh dockerd://meds, and the lines for it in slurm/*.sbatch.
# nvcc has to be of the same major version as the CUDA that torch was built for (13).
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        python3 python3-venv python3-dev g++ git libnuma1 ca-certificates \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /meds
COPY . .
# No GPU is visible while an image is built. Compute capabilities to compile for: H100 and B200.
ENV NVTE_CUDA_ARCHS="90;100"
RUN bash tools/setup.sh cuda && .venv/bin/python -c "import transformer_engine"
ENV PATH=/meds/.venv/bin:$PATH
CMD ["meds", "--help"]
