# mptk on a CPU. From the root of the repository:
#   docker build -f docker/cpu.Dockerfile -t mptk .
#   docker run --rm -v "$PWD:/work" mptk prune smollm2-135m --sparsity 0.3 --method wanda --out runs/w30
FROM python:3.12-slim AS build
COPY . /source
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:3.12-slim
COPY --from=build /wheels /wheels
RUN python -m pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu torch
RUN python -m pip install --no-cache-dir /wheels/*.whl
ENV MPTK_CACHE=/work/.mptk HF_HOME=/work/.mptk/hub
WORKDIR /work
ENTRYPOINT ["mptk"]
CMD ["--help"]
