//! The step protocol on the wire: gRPC client and server that speak step types.
