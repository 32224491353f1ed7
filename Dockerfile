# syntax=docker/dockerfile:1
# Pin the base by digest before you rely on the image: `docker buildx imagetools inspect python:3.11-slim` prints it, then
#   docker build --build-arg BASE=python:3.11-slim@sha256:DIGEST -t deploypipe .
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
WORKDIR /src
RUN python -m venv /opt/deploypipe && /opt/deploypipe/bin/python -m pip install --no-cache-dir --upgrade "pip>=25.1"
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY deploypipe deploypipe
COPY targets targets
COPY profiles profiles
RUN /opt/deploypipe/bin/python -m pip install --no-cache-dir --constraint constraints.txt .

FROM ${BASE}
# The client by which devices are reached; mount your keys and configuration at /home/deploypipe/.ssh.
RUN apt-get update && apt-get install --yes --no-install-recommends openssh-client && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 deploypipe
COPY --from=build /opt/deploypipe /opt/deploypipe
ENV PATH=/opt/deploypipe/bin:$PATH
USER deploypipe
WORKDIR /home/deploypipe
ENTRYPOINT ["deploypipe"]
CMD ["--help"]
