//! paged
