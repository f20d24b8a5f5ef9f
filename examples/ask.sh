#!/usr/bin/env bash
# Ask a running service about an image: medmoe-edge serve & bash examples/ask.sh scan.png
set -euo pipefail

image=${1:-scan.png}
url=${2:-http://localhost:8000}

# With a token: -H "Authorization: Bearer $(cat token)"
curl --fail-with-body --silent --show-error --retry 3 --max-time 90 \
    "$url/v1/ask" \
    --form "image=@$image" \
    --form 'question=Is there effusion?' \
    --form 'question=Which organ is shown?'
