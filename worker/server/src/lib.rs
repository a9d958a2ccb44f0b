//! The worker process: gRPC server around an engine thread.
