//! The catalogue of metrics and log field names.
