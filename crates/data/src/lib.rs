//! Corpora, tokenizers, token shards and the deterministic sampler.
