//! What every front end needs of its listeners, whatever it serves there: the file of a Unix socket, and what to do while
//! the system gives no connections.

mod accept;
mod socket_file;

pub use accept::Failures;
pub use socket_file::{BindError, BoundSocket, MAX_PATH_BYTES, SocketFile};
