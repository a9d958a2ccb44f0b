//! Executes step plans: slots, batches, the CPU backend, the sampler.
