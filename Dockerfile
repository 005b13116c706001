# Not built by our tests, which have no Docker. See docs/serving.md.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv ca-certificates \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY pyproject.toml requirements.lock requirements-pip.lock README.md LICENSE ./
COPY wan ./wan
RUN python3 -m venv /venv \
    && /venv/bin/pip install --no-cache-dir --require-hashes --no-deps --requirement requirements-pip.lock \
    && /venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation . \
    && /venv/bin/pip install --no-cache-dir --require-hashes --constraint requirements.lock "wan-continue[gguf,serve]"

RUN useradd --create-home --uid 10001 wan && mkdir /data /models && chown wan /data
USER wan
WORKDIR /home/wan
VOLUME ["/data", "/models"]
EXPOSE 8188
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["/venv/bin/python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8188/health', timeout=4)"]
ENTRYPOINT ["/venv/bin/wan-serve", "--host", "0.0.0.0", "--output_dir", "/data"]
CMD ["--ckpt_dir", "/models/Wan2.2-TI2V-5B", "--vlm_path", "/models/InternVL3_5-8B", "--api_key_file", "/run/secrets/api_key"]
