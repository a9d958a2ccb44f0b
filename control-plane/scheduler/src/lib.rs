//! The scheduler: pure state machine from events to step plans.
