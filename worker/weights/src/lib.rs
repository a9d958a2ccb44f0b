//! Checkpoints: safetensors reading, random weights, hub download.
