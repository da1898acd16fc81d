//! A registry of images on loopback, behind a wire that can be slow or be cut.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::TempDir;

use super::process;
use super::{Missing, Server, required};

/// Compressing an image of 90 MB and sending it takes its time on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

/// Bytes of the layer that each image has for itself.
const NOISE: usize = 6_000_000;

/// The one that may log in where a login is wanted, and bcrypt's hash of the password. Its `?` and `~`
/// have numbers of their own in base64's two alphabets, wherever they stand.
pub(crate) const USER: &str = "ada";
pub(crate) const PASSWORD: &str = "s3cret~?>";
const HTPASSWD: &str = "ada:$2b$04$Ibq78fGcMUp5NCpVhkKxsOVN8efLtaVJo.WflSOXlU0JLslEe16Ei\n";

/// Dropping it ends the registry and removes the images it published from the engine.
pub(crate) struct Registry {
    process: Child,
    wire: Arc<Wire>,
    port: u16,
    folder: TempDir,
    images: Vec<String>,
}

impl Registry {
    /// Nothing where there is no engine, or no program for it.
    pub(crate) fn start(wants_login: bool) -> Option<Self> {
        required(Server::Docker.image())?;
        let found = Command::new("docker-registry").arg("--version").output();
        required(found.map_err(|e| Missing("docker", format!("docker-registry: {e}"))))?;

        let folder = tempfile::tempdir().expect("a folder can be made");
        let path = |name: &str| folder.path().join(name).display().to_string();
        fs::write(path("htpasswd"), HTPASSWD).expect("ours");
        let auth = if wants_login {
            let file = path("htpasswd");
            format!("auth: {{htpasswd: {{realm: test, path: {file}}}}}\n")
        } else {
            String::new()
        };
        let config = format!(
            "version: 0.1\nlog: {{level: info, accesslog: {{disabled: true}}}}\n{auth}\
             storage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: 127.0.0.1:0}}\n",
            path("storage")
        );
        fs::write(path("config.yml"), config).expect("ours");
        let mut process = Command::new("docker-registry")
            .args(["serve", &path("config.yml")])
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("it was found");
        // time=... level=info msg="listening on 127.0.0.1:41234" ...
        let mut lines = BufReader::new(process.stderr.take().expect("piped")).lines();
        let address = lines
            .by_ref()
            .map_while(Result::ok)
            .find_map(|line| {
                let (_, rest) = line.split_once("listening on 127.0.0.1:")?;
                rest.split('"').next()?.parse().ok()
            })
            .expect("it says where it listens");
        std::thread::spawn(move || lines.for_each(drop));
        let (wire, port) = Wire::stretch(address);
        Some(Self {
            process,
            wire,
            port,
            folder,
            images: Vec::new(),
        })
    }

    /// Its name in an image's: `127.0.0.1:5000`.
    pub(crate) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Publishes `from` (`scratch` or an image that is here) with a layer that no other image
    /// has, and removes it from the engine, so that this layer has to be pulled.
    pub(crate) fn publish(&mut self, from: &str, name: &str) -> String {
        let image = format!("{}/{name}", self.host());
        let context = self.folder.path().join("context");
        fs::create_dir_all(&context).expect("ours");
        let mut noise = vec![0; NOISE];
        fs::File::open("/dev/urandom")
            .and_then(|mut random| random.read_exact(&mut noise))
            .expect("the system has random bytes");
        fs::write(context.join("noise"), noise).expect("ours");
        let file = format!("FROM {from}\nADD noise /noise\n");
        fs::write(context.join("Dockerfile"), file).expect("ours");
        self.images.push(image.clone());
        let context = context.display().to_string();
        let _ = docker(&["build", "-q", "-t", &image, &context]).ok();
        let logins = self.folder.path().display().to_string();
        // Known to this call only.
        let login = ["--config", &logins, "login", "-u", USER, "-p", PASSWORD];
        let _ = docker(&[&login[..], &[&self.host()]].concat()).ok();
        let _ = docker(&["--config", &logins, "push", "-q", &image]).ok();
        let _ = docker(&["rmi", "-f", &image]).ok();
        image
    }

    /// Where the layer of the image that was published last lies.
    pub(crate) fn layer(&self) -> PathBuf {
        let blobs = self
            .folder
            .path()
            .join("storage/docker/registry/v2/blobs/sha256");
        let all = glob::glob(&format!("{}/*/*/data", blobs.display())).expect("a pattern");
        all.flatten()
            .find(|path| {
                let bytes = path.metadata().expect("it is there").len();
                (NOISE as u64..NOISE as u64 + 100_000).contains(&bytes)
            })
            .expect("a layer of that size")
    }

    pub(crate) fn wire(&self) -> &Wire {
        &self.wire
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        for image in &self.images {
            let _ = Command::new("docker").args(["rmi", "-f", image]).output();
        }
    }
}

pub(crate) fn docker(args: &[&str]) -> process::Output {
    let mut command = Command::new("docker");
    command.args(args).env("DOCKER_BUILDKIT", "0");
    process::run(command, LIMIT)
}

/// What lies between the engine and the registry.
pub(crate) struct Wire {
    requests: AtomicU64,
    /// Bytes that still come through; then all connections break.
    left: AtomicU64,
    slow: AtomicU64,
    open: Mutex<Vec<TcpStream>>,
}

impl Wire {
    fn stretch(to: u16) -> (Arc<Self>, u16) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("some port is free");
        let port = listener.local_addr().expect("it is bound").port();
        let wire = Arc::new(Self {
            requests: AtomicU64::new(0),
            left: AtomicU64::new(u64::MAX),
            slow: AtomicU64::new(0),
            open: Mutex::default(),
        });
        let shared = wire.clone();
        std::thread::spawn(move || {
            for engine in listener.incoming().flatten() {
                shared.requests.fetch_add(1, Ordering::SeqCst);
                let Ok(registry) = TcpStream::connect(("127.0.0.1", to)) else {
                    return;
                };
                shared.join(&engine, &registry);
                if shared.left.load(Ordering::SeqCst) == 0 {
                    shared.cut();
                }
            }
        });
        (wire, port)
    }

    fn join(self: &Arc<Self>, engine: &TcpStream, registry: &TcpStream) {
        let clone = |stream: &TcpStream| stream.try_clone().expect("it is open");
        let mut open = self.open.lock().expect("no holder panics");
        open.extend([clone(engine), clone(registry)]);
        let (mut from, mut to) = (clone(engine), clone(registry));
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
        });
        let (mut from, mut to, wire) = (clone(registry), clone(engine), self.clone());
        std::thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(read @ 1..) = from.read(&mut buffer) {
                let left = wire.left.load(Ordering::SeqCst);
                let rest = left.saturating_sub(read as u64);
                wire.left
                    .store(if left == u64::MAX { left } else { rest }, Ordering::SeqCst);
                if rest == 0 || to.write_all(&buffer[..read]).is_err() {
                    wire.cut();
                    return;
                }
                std::thread::sleep(Duration::from_millis(wire.slow.load(Ordering::SeqCst)));
            }
            let _ = to.shutdown(Shutdown::Write);
        });
    }

    fn cut(&self) {
        for stream in self.open.lock().expect("no holder panics").drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// How many connections the engine has made.
    pub(crate) fn connections(&self) -> u64 {
        self.requests.load(Ordering::SeqCst)
    }

    /// Lets 64 KiB through every so many milliseconds.
    pub(crate) fn slow_down(&self, ms: u64) {
        self.slow.store(ms, Ordering::SeqCst);
    }

    /// The registry dies once it has sent so many bytes, and stays dead.
    pub(crate) fn die_after(&self, bytes: u64) {
        self.left.store(bytes, Ordering::SeqCst);
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.left.load(Ordering::SeqCst) == 0
    }

    pub(crate) fn revive(&self) {
        self.left.store(u64::MAX, Ordering::SeqCst);
    }
}
