# A file system with the system's own folder, not its closure.
{
  pkgs,
  storePaths,
  volumeLabel,
}:
pkgs.runCommand "ext4-fs.img" { inherit storePaths; } ''
  mkdir root
  cp -r $storePaths root
  mke2fs -q -t ext4 -L ${volumeLabel} -d root $out 4M
''
