//! Pure choices with their numbers: how long a step takes, how large it is padded. No state of
//! requests is known here.

pub(crate) mod bucket;
pub(crate) mod cost;
pub(crate) mod fair;
pub(crate) mod outlook;
