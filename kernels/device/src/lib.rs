//! Devices: CPU buffers, threads.
