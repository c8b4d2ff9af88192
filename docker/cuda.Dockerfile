# mptk on an NVIDIA GPU, with ONNX Runtime's CUDA provider. Nobody has run it on a GPU yet. From the root of the repository:
#   docker build -f docker/cuda.Dockerfile -t mptk-cuda .
#   docker run --rm --gpus all -v "$PWD:/work" mptk-cuda prune MODEL --sparsity 0.3 --method wanda --out runs/w30
FROM python:3.12-slim AS build
COPY . /source
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:3.12-slim
COPY --from=build /wheels /wheels
RUN python -m pip install --no-cache-dir torch
RUN python -m pip install --no-cache-dir /wheels/*.whl
RUN python -m pip uninstall --yes onnxruntime && python -m pip install --no-cache-dir onnxruntime-gpu
ENV MPTK_CACHE=/work/.mptk HF_HOME=/work/.mptk/hub
WORKDIR /work
ENTRYPOINT ["mptk"]
CMD ["--help"]
