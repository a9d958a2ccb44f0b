//! Seeded simulation of the scheduler with fake workers.
