# docker build -t sat_ext . : what constraints.txt pins, for CUDA. The devel image has the compiler that DeepSpeed's
# CPU optimizers and NVMe offload are built with at their first use.
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04
RUN apt-get update \
    && apt-get install -y --no-install-recommends git libaio-dev ninja-build openssh-client pdsh python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/sat_ext
COPY . .
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
RUN pip install --no-cache-dir -c constraints.txt torch==2.13.0 \
    && pip install --no-cache-dir -c constraints.txt -e ".[bitsandbytes,motion,s3]"
