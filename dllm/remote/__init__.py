"""Shared stores of files that are named by what is in them: IPFS, Ethereum Swarm."""
