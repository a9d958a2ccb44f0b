//! Tests that hold the code to its documentation.
