//! QMP: the machine monitor protocol, JSON over a unix socket.
