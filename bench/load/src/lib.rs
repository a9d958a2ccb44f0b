//! Load generator over the HTTP API.
