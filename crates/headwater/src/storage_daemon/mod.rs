//! `headwater storage-daemon`, which is also what the program is when it is called `qemu-storage-daemon`: named nodes, exports and
//! monitors, put together on the command line, in its order, and by QMP.

mod chardev;
mod line;

use crate::exit::{Exit, Outcome};
use crate::{background, trace};
use chardev::Chardev;
use control::qmp::Open;
use control::{Engine, EngineConfig, Failure};
use line::{Action, Line};
use std::collections::HashMap;
use std::path::Path;
use tokio::signal::unix::{SignalKind, signal};

const HELP: &str = "\
Usage: headwater storage-daemon [options]
Headwater under qemu-storage-daemon's command line

  -h, --help             display this help and exit
  -T, --trace [enable=]PATTERN[,events=FILE][,file=FILE]
                         what to tell; help lists it (HEADWATER_LOG chooses the rest of the log)
  -V, --version          output version information and exit

  --blockdev [driver=]DRIVER[,node-name=N][,discard=ignore|unmap][,cache.direct=on|off][,cache.no-flush=on|off]
             [,read-only=on|off][,driver specific parameters...]
                         configure a block backend
  --chardev socket,id=ID,path=PATH[,server=on|off][,wait=on|off][,reconnect=SECONDS]
  --chardev socket,id=ID,host=HOST,port=PORT[,server=on|off]
  --chardev socket,id=ID,fd=FD[,server=on|off]
  --chardev stdio,id=ID
                         configure a place where a monitor can be
  --daemonize            go into the background once everything stands
  --export [type=]nbd,id=ID,node-name=NODE[,name=NAME][,description=TEXT][,writable=on|off]
  --export [type=]vhost-user-blk,id=ID,node-name=NODE,addr.type=unix,addr.path=SOCKET[,writable=on|off]
           [,num-queues=N]
                         export a node
  --monitor [chardev=]ID[,mode=control][,pretty=on|off]
                         configure a QMP monitor
  --nbd-server addr.type=inet,addr.host=HOST,addr.port=PORT
  --nbd-server addr.type=unix,addr.path=PATH
                         start the NBD server for exports
  --object secret,id=ID,data=TEXT|file=PATH[,format=raw|base64]
  --object throttle-group,id=ID,limits.bps-total=N,...
  --object iothread,id=ID
                         create an object
  --pidfile PATH         write the process's number into this file once everything stands
";

/// Runs with these words.
pub(crate) fn run(words: &[String]) -> Outcome {
    let line = Line::read(words)?;
    if line.help {
        print!("{HELP}");
        return Ok(Exit::Ok);
    }
    if line.version {
        println!("qemu-storage-daemon version 10.0.2 (Headwater {})", env!("CARGO_PKG_VERSION"));
        return Ok(Exit::Ok);
    }
    if !line.daemonize {
        line.hand_over();
    }
    if trace::options(&line.traces)? {
        return Ok(Exit::Ok);
    }
    if line.daemonize {
        return background::start("--daemonize", "--pidfile", line.pid_file.as_deref(), "storage-daemon");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| format!("could not set up the control thread: {error}"))?.block_on(serve(&line))
}

async fn serve(line: &Line) -> Outcome {
    // Before anything is there to clean up, so that no signal finds the default action.
    let mut ends = Vec::new();
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
        ends.push(signal(kind).map_err(|error| format!("could not watch for signals: {error}"))?);
    }
    let engine = Engine::start(&EngineConfig::default()).map_err(|error| format!("could not start: {error}"))?;
    let mut signalled = futures_util::future::select_all(ends.iter_mut().map(|end| Box::pin(end.recv())));
    // Also while it waits for somebody to come to a monitor.
    let started = tokio::select! {
        started = start(line, &engine) => Some(started),
        _ = &mut signalled => None,
    };
    if let Some(Ok(())) = started {
        tokio::select! {
            _ = signalled => {}
            () = engine.quit_requested() => {}
        }
    }
    let stood = matches!(started, Some(Ok(())));
    let started = started.unwrap_or(Ok(()));
    let ended = engine.shut_down().await.map_err(|error| error.to_string());
    if let (true, Some(path)) = (stood, &line.pid_file) {
        // It may be gone already: then there is nothing to do.
        let _ = std::fs::remove_file(path);
    }
    started.and(ended)?;
    Ok(Exit::Ok)
}

/// Does what the line says, in its order.
async fn start(line: &Line, engine: &Engine) -> Result<(), String> {
    let mut chardevs: HashMap<String, Open> = HashMap::new();
    for (option, action) in &line.actions {
        let done = act(option, action, engine, &mut chardevs).await;
        done.map_err(|failure| format!("{option}: {}", failure.desc))?;
    }
    let admitted = engine.on_nodes(|shard| async move {
        shard.admit_nbd_clients();
        Ok(())
    });
    admitted.await.map_err(|failure| failure.desc)?;
    if let Some(path) = &line.pid_file {
        write_pid(path)?;
    }
    background::stands();
    Ok(())
}

async fn act(
    option: &str,
    action: &Action,
    engine: &Engine,
    chardevs: &mut HashMap<String, Open>,
) -> Result<(), Failure> {
    match action {
        Action::Blockdev(tree) => control::qmp::blockdev_add(engine, tree.clone()).await,
        Action::Object(tree) => control::qmp::object_add(engine, tree.clone()).await,
        Action::Export(tree) => control::qmp::export_add(engine, tree.clone()).await,
        Action::NbdServer(tree) => control::qmp::nbd_server_start(engine, tree.clone()).await,
        Action::Chardev(tree) => {
            let chardev = Chardev::read(tree.clone()).map_err(Failure::generic)?;
            let (id, taken) = chardev.take(option).await?;
            if chardevs.insert(id, taken).is_some() {
                return Err(Failure::generic("duplicate yank instance"));
            }
            Ok(())
        }
        Action::Monitor { chardev, pretty } => {
            let place =
                chardevs.remove(chardev).ok_or_else(|| Failure::generic(format!("chardev \"{chardev}\" not found")))?;
            chardev::serve(place, engine, *pretty);
            Ok(())
        }
    }
}

fn write_pid(path: &Path) -> Result<(), String> {
    std::fs::write(path, format!("{}\n", std::process::id())).map_err(|error| {
        let said = error.to_string();
        let said = said.split(" (os error").next().unwrap_or(&said);
        format!("cannot create PID file: Could not create '{}': {said}", path.display())
    })
}
