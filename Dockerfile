# The last stage, which a plain build makes, serves: no PyTorch, no pip of its own, no build tools, no tests inside.
#
#   docker build -t rnnserve .                               for CPUs
#   docker build -t rnnserve:gpu --build-arg RUNTIME=gpu .   for NVIDIA GPUs: --gpus all --env RNNSERVE_PROVIDER=cuda
#   docker build -t rnnserve-trainer --target trainer .      for training and export
#
# Where pip installs from can be said with --build-arg: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS. PyPI's
# PyTorch brings 4 GB of CUDA libraries; a build for CPUs, from PyTorch's own index, leaves the trainer at 1.5 GB.

ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS installer
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
# As variables, since a stage built on this one need not inherit its arguments; none of this gets into an image.
ENV PIP_INDEX_URL=$PIP_INDEX_URL PIP_EXTRA_INDEX_URL=$PIP_EXTRA_INDEX_URL PIP_FIND_LINKS=$PIP_FIND_LINKS
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_PYTHON=/opt/rnnserve/bin/python
RUN python -m venv --without-pip /opt/rnnserve
WORKDIR /src
COPY pyproject.toml deploy/requirements.py ./

FROM installer AS serving-files
ARG RUNTIME=cpu
RUN python requirements.py ${RUNTIME} > requirements.txt && pip install --requirement requirements.txt
COPY LICENSE README.md ./
COPY models models
COPY service service
RUN pip install --no-deps . && find /opt/rnnserve -type d -name tests -prune -exec rm -r {} +

FROM installer AS trainer-files
RUN python requirements.py train cpu > requirements.txt && pip install --requirement requirements.txt
COPY LICENSE README.md ./
COPY models models
COPY service service
RUN pip install --no-deps .

FROM ${PYTHON_IMAGE} AS common
LABEL org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.vendor="The rnnserve authors" \
      org.opencontainers.image.version="0.1.0"
ENV PATH=/opt/rnnserve/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# onnxruntime's builds for Linux send usage data to their maker unless this is set when it is imported.
ENV ORT_DISABLE_TELEMETRY=1
RUN install --directory --owner=10001 --group=10001 /models /runs
USER 10001:10001
ENTRYPOINT ["rnnserve"]

FROM common AS trainer
LABEL org.opencontainers.image.title="rnnserve-trainer" \
      org.opencontainers.image.description="Trains recurrent networks and exports them to ONNX."
ENV HOME=/tmp
COPY --from=trainer-files /opt/rnnserve /opt/rnnserve
CMD ["train", "--help"]

FROM common AS serving
LABEL org.opencontainers.image.title="rnnserve" \
      org.opencontainers.image.description="Streams an output per timestep of every live sequence over gRPC."
COPY --from=serving-files /opt/rnnserve /opt/rnnserve
EXPOSE 8001 8002
STOPSIGNAL SIGTERM
# Whoever sets RNNSERVE_PORT sets RNNSERVE_SERVER too, which tells the check where to ask.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["rnnserve", "health"]
# Every setting of the server can be given as a variable like these two; `rnnserve serve --help` lists them.
ENV RNNSERVE_HOST=0.0.0.0 RNNSERVE_REPOSITORY=/models
CMD ["serve"]
